"""Makes a data set that jaxlab can train on out of files on disk, or with TFDS.

python -m launch.prepare_data mnist --source DIR          # train-images-idx3-ubyte.gz, ...
python -m launch.prepare_data cifar10 --source DIR        # data_batch_1, ..., batches.meta
python -m launch.prepare_data pacs --source DIR --size 64 # photo/dog/001.jpg, sketch/dog/001.png, ...
python -m launch.prepare_data cifar10                     # TFDS downloads it

Biased data sets, with an attribute beside the label (BAR has none):

python -m launch.prepare_data colored_mnist --source DIR  # train/images.npy, train/attrs.npy, valid/...
python -m launch.prepare_data bffhq --source bffhq/0.5pct --size 224  # align/0/1_0_0.png, conflict/...
python -m launch.prepare_data bar --source DIR --size 224 # train/climbing_0.jpg, test/climbing_326.jpg

Data sets with domains or other metadata of each image:

python -m launch.prepare_data waterbirds --source DIR --size 224  # metadata.csv: img_filename,y,split,place
python -m launch.prepare_data nico_animal --source DIR --size 224 # dog/on_grass/1.jpg, dog/in_street/2.jpg
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from jaxlab.core import UserError
from jaxlab.data import biased, nico, raw, store, wilds
from launch import cli

_READERS = {"idx": raw.idx_folder, "cifar": raw.cifar_folder, "arrays": biased.array_folder}
_IMAGE_READERS = {  # these can resize
    "folder": raw.image_folder,
    "biased": biased.biased_folder,
    "flat": biased.flat_folder,
    "wilds": wilds.metadata_folder,
    "nico": nico.nico_folder,
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.source is None:
        if arguments.layout != "auto" or arguments.size is not None:
            raise UserError("--layout and --size say how to read files: give their folder with --source DIR.")
        builder = store.tfds_builder(arguments.name, arguments.data_dir)
    else:
        raw_dataset = _read(arguments.source, arguments.layout, arguments.size)
        builder = store.raw_builder(arguments.name, _with_progress(raw_dataset), arguments.data_dir)
    there = os.path.isdir(builder.data_dir)
    try:
        store.generate(builder)
    except UserError:
        raise
    except Exception as error:  # TFDS's own builders: a lost connection, a wrong checksum, a manual download
        if arguments.source is not None:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"TFDS failed to make '{arguments.name}' ({reason}); give files: --source DIR."
        ) from error
    builder = store.open_builder(arguments.name, arguments.data_dir)
    splits = ", ".join(f"{name} {info.num_examples}" for name, info in builder.info.splits.items())
    print(f"{'Already there' if there else 'Wrote'}: {builder.data_dir} ({splits})")
    if there:
        print("To make it anew, delete that folder first.")
    folder = store.data_folder(arguments.data_dir)
    print(f'Use it as data set "{arguments.name}" with data_dir "{folder}" (or TFDS_DATA_DIR={folder}).')
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.prepare_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", metavar="NAME", help="in TFDS's style: mnist, fashion_mnist, cifar10, my_images"
    )
    parser.add_argument(
        "--source",
        type=Path,
        metavar="DIR",
        help="the folder of the files; left out, TFDS downloads the data set (some need TensorFlow for it)",
    )
    parser.add_argument(
        "--data_dir",
        metavar="DIR",
        help="where to write; $TFDS_DATA_DIR or ~/tensorflow_datasets if left out",
    )
    parser.add_argument(
        "--layout",
        choices=("auto", *_READERS, *_IMAGE_READERS),
        default="auto",
        help="idx: as MNIST comes; cifar: its python version; folder: domain/class/*.png|jpg;"
        " arrays: images.npy and attrs.npy in train/ and valid/, as LfF makes them;"
        " biased: align|conflict/class/*_<label>_<attribute>.png as BFFHQ comes, valid and test beside them"
        " or one level up; flat: train|test/<class>_*.jpg as BAR comes;"
        " wilds: metadata.csv with each image's filename, split, label and metadata, as Waterbirds comes;"
        " nico: class/context/*.jpg of NICO's animals or vehicles, split by context as for DecAug",
    )
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="resize the images of a folder to PIXELS × PIXELS"
    )
    return parser


def _read(source: Path, layout: str, size: int | None) -> raw.RawDataset:
    if layout == "auto":
        layout = raw.find_layout(source)
        if layout == "folder" and nico.is_nico(source):
            layout = "nico"
    if size is not None and (layout not in _IMAGE_READERS or not 1 <= size <= 4096):
        raise UserError(
            f"--size {size}: takes 1 to 4096 pixels, and only for image folders (layout '{layout}')."
        )
    if layout in _IMAGE_READERS:
        return _IMAGE_READERS[layout](source, size)
    return _READERS[layout](source)


def _with_progress(dataset: raw.RawDataset) -> raw.RawDataset:
    console = Console(stderr=True)

    def tracked(name: str, split: raw.Split) -> raw.Split:
        bar = track(split.examples, name, split.count, console=console, disable=not console.is_terminal)
        return split._replace(examples=bar)

    return dataset._replace(splits={name: tracked(name, split) for name, split in dataset.splits.items()})


if __name__ == "__main__":
    cli.run(main)
