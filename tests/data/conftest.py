import pytest

from jaxlab.data import store


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with `digits`, made once."""
    folder = str(tmp_path_factory.mktemp("tensorflow_datasets"))
    store.open_builder("digits", folder)
    return folder
