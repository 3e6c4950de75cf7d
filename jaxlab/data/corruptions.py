"""Corrupted images: twenty corruptions of 32 × 32 colour images, one of which is the spurious attribute.

The corruptions are those of CIFAR-10-C, Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations" (ICLR 2019), as its generator `make_cifar_c.py` makes them, which
Corrupted CIFAR-10 of Nam et al., "Learning from Failure: Training Debiased Classifier from Biased
Classifier" (NeurIPS 2020) uses unchanged. So are their oddities: pixels are truncated to uint8, not
rounded, and a level need not be stronger than the one below it (saturation first fades, then glows).
The generator fixes no seed; all draws here come from the random generator that a function is given. On the
same draws, pixels were equal to those of the published code, run with OpenCV 5.0, scikit-image 0.26, SciPy
1.17, Pillow 13 and ImageMagick 6.9.11 (which is not needed here).
"""

import functools
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from scipy import ndimage
from skimage.color import hsv2rgb, rgb2hsv
from skimage.filters import gaussian
from skimage.util import random_noise

from jaxlab.core import UserError
from jaxlab.core.errors import nearest
from jaxlab.data.coloring import make_bias_attributes

logger = logging.getLogger(__name__)

Dataset = Mapping[str, np.ndarray]

FAMILIES: Mapping[str, tuple[str, ...]] = {
    # The two sets of Nam et al., marked ¹ and ² in their tables.
    "type0": (
        "snow",
        "frost",
        "fog",
        "brightness",
        "contrast",
        "spatter",
        "elastic",
        "jpeg",
        "pixelate",
        "saturate",
    ),
    "type1": (
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "speckle_noise",
        "gaussian_blur",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "original",
    ),
    # Lee et al., "Learning Debiased Representation via Disentangled Feature Augmentation" (NeurIPS 2021).
    "disentangled": (
        "brightness",
        "contrast",
        "gaussian_noise",
        "frost",
        "elastic",
        "gaussian_blur",
        "defocus_blur",
        "impulse_noise",
        "saturate",
        "pixelate",
    ),
}

# The constants of levels 1 to 5. Lengths are in pixels of a 32 × 32 image, colours in [0, 1].
LEVELS: Mapping[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation
    "shot_noise": (500, 250, 100, 75, 50),  # photons in a white pixel
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of values replaced
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),  # standard deviation, relative to the value
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),  # standard deviation
    # standard deviation of the blur, reach of a displacement, repetitions
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),  # radius, anti-aliasing
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),  # radius, standard deviation
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),  # where the factors stop
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),  # thickness, decay of the plasma
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),  # weights of image and frost
    # mean, deviation, zoom and threshold of the flakes; radius and deviation of their fall; image's weight
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    # mean, deviation, blur and threshold of the drops; strength of water or blur of mud; whether it is mud
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to the value of HSV
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),  # factor, then summand
    "jpeg": (80, 65, 58, 50, 40),  # quality
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # of the side
    # in sides of the image: size and smoothness of the displacements, reach of the affine map's corners
    "elastic": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
}

_SIDE = 32
_WATER = np.float32([175, 238, 238]) / 255  # pale turquoise
_MUD = np.float32([63, 42, 20]) / 255


def _constants(name: str, image: np.ndarray, level: int) -> Any:
    """What a corruption uses at `level`, after a look at both of its arguments."""
    if image.dtype != np.uint8 or image.shape != (_SIDE, _SIDE, 3):
        raise UserError(
            f"corruptions.{name}: an image is {image.dtype} {image.shape}; its constants are made for uint8"
            f" ({_SIDE}, {_SIDE}, 3) only."
        )
    if level not in range(1, 6):
        raise UserError(f"corruptions.{name}: level is {level}; it must be 1, 2, 3, 4 or 5.")
    return LEVELS[name][level - 1]


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


# Each corruption takes an image uint8 [32, 32, 3], a level 1 to 5 and the generator of its draws (left alone
# by those that draw nothing), returns the corrupted image uint8 [32, 32, 3], and raises UserError where the
# image or the level is another.


def original(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """The image itself."""
    return image


# --- Noise ---


def gaussian_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Adds independent normal noise to each value."""
    std = _constants("gaussian_noise", image, level)
    return _to_uint8(image / 255 + rng.normal(scale=std, size=image.shape))


def shot_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Counts photons: each value becomes a Poisson draw of that mean."""
    photons = _constants("shot_noise", image, level)
    return _to_uint8(rng.poisson(image / 255 * photons) / photons)


def impulse_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Salt and pepper: sets a share of the values, channels apart, to 0 or 255 with equal chances."""
    amount = _constants("impulse_noise", image, level)
    return _to_uint8(random_noise(image / 255, mode="s&p", amount=amount, rng=rng))


def speckle_noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Multiplies each value by one plus independent normal noise."""
    std = _constants("speckle_noise", image, level)
    scaled = image / 255
    return _to_uint8(scaled + scaled * rng.normal(scale=std, size=image.shape))


# --- Blur ---


def gaussian_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Convolves with a Gaussian, the edge repeated."""
    std = _constants("gaussian_blur", image, level)
    return _to_uint8(gaussian(image / 255, std, channel_axis=-1))


def defocus_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Convolves with a disk that is smoothed by a 3 × 3 Gaussian, the image reflected at its edge."""
    radius, smoothing = _constants("defocus_blur", image, level)
    y, x = np.mgrid[-8:9, -8:9]
    disk = np.float32(x**2 + y**2 <= radius**2)
    kernel = cv2.GaussianBlur(disk / disk.sum(), (3, 3), smoothing)
    return _to_uint8(cv2.filter2D(image / 255, -1, kernel))


def glass_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Blurs, gives each pixel off the border its own colour or that of one above or left of it, blurs again.

    The published code means to swap the two pixels. But it swaps views of one array, which copies the one
    to the other; and in its order, from the last pixel to the first, no pixel is read after it is written.
    """
    std, reach, repetitions = _constants("glass_blur", image, level)
    pixels = _to_uint8(gaussian(image / 255, std, channel_axis=-1))
    rows, columns = np.mgrid[reach + 1 : _SIDE - reach + 1, reach + 1 : _SIDE - reach + 1]
    for _ in range(repetitions):
        dx, dy = rng.integers(-reach, reach, (2, *rows.shape))
        pixels[rows, columns] = pixels[rows + dy, columns + dx]
    return _to_uint8(gaussian(pixels / 255, std, channel_axis=-1))


def motion_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Blurs along a ray, at a random angle of up to 45 degrees to the horizontal."""
    radius, std = _constants("motion_blur", image, level)
    return _ray_blur(image, radius, std, rng.uniform(-45, 45))


def zoom_blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Averages the image with enlargements by 1, 1.01, 1.02 and so on, cut to its size."""
    stop = _constants("zoom_blur", image, level)
    # Rounding makes 1.06 and 1.11 the last factors of levels 1 and 2, 1.15, 1.20, 1.25 those of the others.
    factors = np.arange(1, stop, 0.01)
    planes = np.moveaxis(np.float32(image) / 255, -1, 0)
    total = planes + sum(np.float32(_clipped_zoom(planes, factor)) for factor in factors)
    return np.moveaxis(_to_uint8(total / (len(factors) + 1)), 0, -1)


def _ray_blur(image: np.ndarray, radius: int, std: float, angle: float) -> np.ndarray:
    """ImageMagick's MotionBlur, of uint8 [H, W] or [H, W, C] and an angle in degrees.

    Each pixel becomes a mean of the `2 * radius + 1` pixels from itself along a ray, clockwise from the
    right on the screen, with the weights of one half of a Gaussian; the edge is repeated. Equals what
    ImageMagick 6.9.11 (Q16) writes as PNG; other versions may round otherwise.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * std**2))
    direction = np.exp(1j * np.deg2rad(angle))
    dx = np.ceil(steps * direction.real - 0.5).astype(int)
    dy = np.ceil(steps * direction.imag - 0.5).astype(int)
    kernel = np.zeros((4 * radius + 1, 4 * radius + 1))
    np.add.at(kernel, (2 * radius + dy, 2 * radius + dx), weights / weights.sum())
    blurred = cv2.filter2D(image.astype(np.float64), -1, kernel, borderType=cv2.BORDER_REPLICATE)
    return (blurred + 0.5 / 257).astype(np.uint8)  # rounded to 16 bits, then truncated to 8


def _clipped_zoom(planes: np.ndarray, factor: float) -> np.ndarray:
    """The middle of each plane [..., 32, 32], enlarged by `factor` >= 1 with linear interpolation."""
    matrix = _zoom_matrix(factor)
    return matrix @ planes @ matrix.T


@functools.cache
def _zoom_matrix(factor: float) -> np.ndarray:
    """[32, 32]: `ndimage.zoom` of the middle of a column, cut to 32, as the linear map that it is.

    The rows and columns of an image are zoomed apart; the products take a twentieth of `ndimage`'s time.
    """
    middle = int(np.ceil(_SIDE / factor))
    top = (_SIDE - middle) // 2
    zoomed = ndimage.zoom(np.eye(_SIDE)[top : top + middle], (factor, 1), order=1)
    top = (len(zoomed) - _SIDE) // 2
    return zoomed[top : top + _SIDE]


# --- Weather ---


def snow(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Whitens the image and lets flakes fall on it; each is a streak, seen a second time upside down."""
    mean, std, zoom, threshold, radius, blur_std, weight = _constants("snow", image, level)
    scaled = np.float32(image) / 255
    flakes = _clipped_zoom(rng.normal(mean, std, (_SIDE, _SIDE)), zoom)
    flakes = _to_uint8(np.where(flakes < threshold, 0, flakes))
    flakes = _ray_blur(flakes, radius, blur_std, rng.uniform(-135, -45))[..., None] / 255
    gray = cv2.cvtColor(scaled, cv2.COLOR_RGB2GRAY)[..., None]
    whitened = weight * scaled + (1 - weight) * np.maximum(scaled, 1.5 * gray + 0.5)
    return _to_uint8(whitened + flakes + np.rot90(flakes, 2))


def frost(
    image: np.ndarray, level: int, rng: np.random.Generator, photographs: Sequence[np.ndarray]
) -> np.ndarray:
    """Adds a random cut-out of a random photograph of frost.

    Args:
      image: uint8 [32, 32, 3].
      level: 1 to 5.
      rng: of the draws.
      photographs: uint8 [H, W, 3], each more than 32 pixels high and wide, see `read_frost`.
    """
    image_weight, frost_weight = _constants("frost", image, level)
    photograph = photographs[rng.integers(len(photographs))]
    top, left = (rng.integers(size - _SIDE) for size in photograph.shape[:2])
    layer = photograph[top : top + _SIDE, left : left + _SIDE]
    return np.clip(image_weight * image + frost_weight * layer, 0, 255).astype(np.uint8)


def read_frost(folder: str) -> list[np.ndarray]:
    """Reads the photographs that `frost` lays over an image: the first five of a folder by name.

    The published ones are `frost1.png` to `frost6.jpg`, of which the sixth is not used. Like those, all are
    shrunk to a fifth.

    Returns:
      uint8 [H, W, 3], RGB.

    Raises:
      UserError: the folder has no PNG or JPEG files, or one is broken or too small.
    """
    paths = sorted(p for p in Path(folder).glob("[!.]*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise UserError(f"{folder}: no images; frost_dir must hold photographs of frost, *.png or *.jpg.")
    photographs = []
    for path in paths[:5]:
        if (photograph := cv2.imread(str(path))) is None:
            raise UserError(f"{path}: broken image; replace or remove it.")
        height, width, _ = photograph.shape
        shrunk = cv2.resize(photograph, None, fx=0.2, fy=0.2)
        if min(shrunk.shape[:2]) <= _SIDE:
            raise UserError(
                f"{path}: {width} × {height} pixels; a photograph of frost needs more than"
                f" {5 * _SIDE} × {5 * _SIDE}: replace or remove it."
            )
        photographs.append(shrunk[..., ::-1])  # OpenCV reads BGR
    return photographs


def fog(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Adds a plasma fractal and scales so that the brightest value of the image stays attainable."""
    thickness, decay = _constants("fog", image, level)
    scaled = image / 255
    highest = scaled.max()
    plasma = _plasma_fractal(_SIDE, decay, rng)[..., None]
    return _to_uint8((scaled + thickness * plasma) * highest / (highest + thickness))


def spatter(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Spatters with drops of water (levels 1 to 3), lit from one side, or with mud (4, 5)."""
    mean, std, blur, threshold, strength, is_mud = _constants("spatter", image, level)
    scaled = np.float32(image) / 255
    liquid = gaussian(rng.normal(mean, std, (_SIDE, _SIDE)), blur)
    if is_mud:
        cover = gaussian(np.float32(liquid > threshold), strength)[..., None]
        cover = np.where(cover < 0.8, 0, cover)
        return _to_uint8((1 - cover) * scaled + cover * _MUD)
    # Values above 255 wrap around, as in the published images.
    drops = (np.where(liquid < threshold, 0, liquid) * 255).astype(np.int32).astype(np.uint8)
    depth = cv2.distanceTransform(255 - cv2.Canny(drops, 50, 150), cv2.DIST_L2, 5)
    depth = cv2.equalizeHist(cv2.blur(np.minimum(depth, 20), (3, 3)).astype(np.uint8))
    relief = cv2.filter2D(depth, cv2.CV_8U, np.float32([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    water = drops * cv2.blur(relief, (3, 3)).astype(np.float32)
    water = water / max(water.max(), 1) * strength  # all zeros where no drop has fallen
    return _to_uint8(scaled + water[..., None] * _WATER)


def _plasma_fractal(size: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """A random periodic height map [size, size] in [0, 1], by the diamond-square algorithm.

    Points are set from the coarsest grid to the finest, each to the mean of its four neighbours plus noise
    of amplitude 100² that shrinks by `decay`² from grid to grid; `size` is a power of two.
    """
    heights = np.zeros((size, size))
    wobble, step = 100.0, size

    def mean_with_noise(total: np.ndarray) -> np.ndarray:
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while step > 1:
        half = step // 2
        corners, centres = heights[::step, ::step], heights[half::step, half::step]
        right, below = np.roll(corners, -1, 1), np.roll(corners, -1, 0)
        centres[:] = mean_with_noise(corners + right + below + np.roll(right, -1, 0))
        heights[::step, half::step] = mean_with_noise(corners + right + centres + np.roll(centres, 1, 0))
        heights[half::step, ::step] = mean_with_noise(corners + below + centres + np.roll(centres, 1, 1))
        wobble, step = wobble / decay, half
    heights -= heights.min()
    return heights / heights.max()


# --- Digital ---


def brightness(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Adds to the value of HSV."""
    summand = _constants("brightness", image, level)
    hsv = rgb2hsv(image / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + summand, 0, 1)
    return _to_uint8(hsv2rgb(hsv))


def contrast(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Moves each value towards the mean of its channel."""
    factor = _constants("contrast", image, level)
    scaled = image / 255
    mean = scaled.mean((0, 1))
    return _to_uint8((scaled - mean) * factor + mean)


def saturate(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Scales the saturation of HSV and adds to it."""
    factor, summand = _constants("saturate", image, level)
    hsv = rgb2hsv(image / 255)
    hsv[..., 1] = np.clip(hsv[..., 1] * factor + summand, 0, 1)
    return _to_uint8(hsv2rgb(hsv))


def jpeg(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Compresses with JPEG, chroma at half resolution."""
    quality = _constants("jpeg", image, level)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


def pixelate(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Shrinks with a box filter and enlarges again."""
    side = int(_SIDE * _constants("pixelate", image, level))
    shrunk = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
    return np.array(shrunk.resize((_SIDE, _SIDE), Image.Resampling.BOX))


def elastic(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Warps by a random affine map, then displaces each pixel along a smooth random field."""
    size, smoothness, reach = (_SIDE * c for c in _constants("elastic", image, level))
    corners = np.float32([[26, 26], [26, 6], [6, 6]])
    moved = corners + np.float32(rng.uniform(-reach, reach, corners.shape))
    warped = cv2.warpAffine(
        np.float32(image) / 255,
        cv2.getAffineTransform(corners, moved),
        (_SIDE, _SIDE),
        borderMode=cv2.BORDER_REFLECT_101,
    )
    dx, dy = (
        size * gaussian(rng.uniform(-1, 1, (_SIDE, _SIDE)), smoothness, mode="reflect", truncate=3)
        for _ in range(2)
    )
    rows, columns = np.mgrid[:_SIDE, :_SIDE]
    displaced = [
        ndimage.map_coordinates(channel, [rows + dy, columns + dx], order=1, mode="reflect")
        for channel in np.moveaxis(warped, -1, 0)
    ]
    return _to_uint8(np.stack(displaced, -1))


CORRUPTIONS: Mapping[str, Callable[..., np.ndarray]] = {
    function.__name__: function
    for function in (
        *(original, gaussian_noise, shot_noise, impulse_noise, speckle_noise),
        *(gaussian_blur, defocus_blur, glass_blur, motion_blur, zoom_blur),
        *(snow, frost, fog, spatter),
        *(brightness, contrast, saturate, jpeg, pixelate, elastic),
    )
}


def corrupted_images(
    dataset: Dataset,
    *,
    corruptions: str | tuple[str, ...] = "type0",
    aligned_ratio: float,
    severity: int = 4,
    balanced: bool = False,
    seed: int = 0,
    frost_dir: str | None = None,
    keep_variants: bool = False,
) -> Dataset:
    """Corrupts each image of a data set once; class k is aligned with the k-th corruption.

    Args:
      dataset: `image` uint8 [N, 32, 32, 3] and `label` [N].
      corruptions: a name of `FAMILIES`, or names of `CORRUPTIONS`, as many as there are classes or more.
      aligned_ratio: the share of each class with its own corruption: 0.95, 0.98, 0.99, 0.995 in the paper.
      severity: 1 to 4, as in the paper's names of data sets; the level of the corruptions is one more.
      balanced: for evaluation: whatever `aligned_ratio` is, every corruption is equally frequent in each
        class.
      seed: of the draws, which depend on it, on the image's place and on its corruption, and on nothing
        else; take another for the evaluation set.
      frost_dir: a folder of photographs of frost, see `read_frost`. Without it "frost" leaves its images as
        they are, and a warning says so.
      keep_variants: also returns every image under every corruption.

    Returns:
      `image` uint8 [N, 32, 32, 3], `label` int32 [N], `attribute` int32 [N], the corruption's place in
      `corruptions`; where `keep_variants`, `variants` uint8 [N, A, 32, 32, 3] too (30 KiB an image for ten
      corruptions), of which `image` is the attribute's.

    Raises:
      UserError: unknown corruptions or fewer than classes, images of another size or type, or another
        argument out of its range; see also `read_frost`.
    """
    functions = _find(corruptions, frost_dir)
    image, label = dataset["image"], dataset["label"]
    count, num_attrs = len(image), len(functions)
    if num_attrs <= label.max():
        raise UserError(
            f"corruptions: {num_attrs} corruptions for labels up to {label.max()}; give one for each class."
        )
    if severity not in range(1, 5):
        raise UserError(f"corruptions: severity is {severity}; it must be 1, 2, 3 or 4.")
    attribute = make_bias_attributes(label, 1 / num_attrs if balanced else aligned_ratio, num_attrs)

    wanted = np.tile(np.arange(num_attrs), (count, 1)) if keep_variants else attribute[:, None]
    corrupted = np.empty((*wanted.shape, *image.shape[1:]), np.uint8)
    console = Console()
    shown = track(
        wanted, "corrupting images", console=console, transient=True, disable=not console.is_terminal
    )
    for n, row in enumerate(shown):
        for i, a in enumerate(row.tolist()):
            corrupted[n, i] = functions[a](image[n], severity + 1, np.random.default_rng([seed, n, a]))
    columns = {"label": label.astype(np.int32), "attribute": attribute}
    if keep_variants:
        return {"image": corrupted[np.arange(count), attribute], **columns, "variants": corrupted}
    return {"image": corrupted[:, 0], **columns}


def _find(corruptions: str | Sequence[str], frost_dir: str | None) -> list[Callable[..., np.ndarray]]:
    if isinstance(corruptions, str) and corruptions not in FAMILIES:
        raise UserError(
            f"corruptions: no family '{corruptions}'.{nearest(corruptions, FAMILIES)}"
            f" There are {', '.join(FAMILIES)}; or give a tuple of names of corruptions."
        )
    names = FAMILIES[corruptions] if isinstance(corruptions, str) else corruptions
    for name in names:
        if name not in CORRUPTIONS:
            raise UserError(
                f"corruptions: no corruption '{name}'.{nearest(name, CORRUPTIONS)}"
                f" There are {', '.join(CORRUPTIONS)}."
            )
    functions = dict(CORRUPTIONS)
    if "frost" in names and frost_dir is None:
        logger.warning(
            "corruptions: without photographs 'frost' leaves its images as they are; set frost_dir to a"
            " folder of them (frost1.png to frost6.jpg of github.com/hendrycks/robustness)."
        )
        functions["frost"] = original
    elif "frost" in names:
        functions["frost"] = functools.partial(frost, photographs=read_frost(frost_dir))
    return [functions[name] for name in names]
