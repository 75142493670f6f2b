"""Where files lie, and one line for what is not there."""

from pathlib import Path

import pytest

from fltac.errors import InputError
from fltac.paths import cache_folder, expand, resolve


def test_variables_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEWHERE", "/data")
    assert expand("${SOMEWHERE}/glue", "data_root") == "/data/glue"
    with pytest.raises(InputError, match=r"data_root: .*NOWHERE_AT_ALL, which is not set"):
        expand("${NOWHERE_AT_ALL}/glue", "data_root")


def test_a_folder_in_a_package() -> None:
    assert Path(resolve("package:fltac/server", "backbone.name")).name == "server"
    assert resolve("bert-base-uncased", "backbone.name") == "bert-base-uncased"


@pytest.mark.parametrize(
    "name", ["package:", "package:no_such_package/x", "package:no.such.package/x", "package:fltac/x"]
)
def test_a_package_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match=r"backbone.name: 'package:"):
        resolve(name, "backbone.name")


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLTAC_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"FLTAC_CACHE: .*file cannot be made"):
        cache_folder()
