"""The coordinator's app folder, its certificates, and how a run is started again; needs the extra ``flower``."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fltac.cli import main
from fltac.config import load_config
from fltac.errors import InputError, RunError
from fltac.runtime.flower_app import resume, resume_command, write_app
from fltac.runtime.run_directory import RunDirectory, create, open_existing

TREE = {"backbone": {"name": "x"}, "server": {"clustering": {"k": 2}}}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(TREE))
    return file


def exit_code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_an_app_is_what_flower_builds(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="needs the extra `flower`")
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    write_app(tmp_path / "federation", load_config(TREE))
    found, warnings = load_and_validate(tmp_path / "federation" / "pyproject.toml")
    assert warnings == []
    assert set(found["tool"]["flwr"]["app"]["config"]) == {"app", "directory", "overrides"}
    assert len(build_fab_from_disk(tmp_path / "federation")) > 500
    assert load_config(tmp_path / "federation" / "experiment.yaml") == load_config(TREE)
    readme = (tmp_path / "federation" / "README.md").read_text()
    assert "flower-superlink --ssl-ca-certfile" in readme
    assert f"flwr run {tmp_path / 'federation'} federation --stream" in readme


def test_both_components_load_with_the_config_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flwr", reason="needs the extra `flower`")
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    write_app(tmp_path / "federation", load_config(TREE))
    monkeypatch.syspath_prepend(str(tmp_path / "federation"))
    import fltac_federation.client_app
    import fltac_federation.server_app

    assert isinstance(fltac_federation.server_app.app, ServerApp)
    assert isinstance(fltac_federation.client_app.app, ClientApp)


def test_what_cannot_be_an_app_is_refused_in_one_line(
    tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flwr", reason="needs the extra `flower`")
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thing").touch()
    for out, override, expected in (
        (occupied, "", "is not empty"),
        (tmp_path / "1st_app", "", "the folder's name becomes the app's"),
        (tmp_path / "app", "method=central", "federation.pool"),
        (tmp_path / "app", "federation.quorum=11", "federation.quorum: got 11; at most federation.clients=10"),
    ):
        assert exit_code("flower", "init", out, "--config", config_file, *([override] if override else [])) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line
    assert not (tmp_path / "app").exists()
    assert exit_code("flower", "init", tmp_path / "app", "--config", config_file, "lora.rank=3") == 0
    assert load_config(tmp_path / "app" / "experiment.yaml").lora.rank == 3


def test_without_flower_one_line_says_what_to_install(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in (["init", tmp_path / "app", "--config", config_file], ["certs", tmp_path / "certs"]):
        assert exit_code("flower", *command) == 2
        assert capsys.readouterr().err == "error: Flower is not installed; type: pip install 'fltac[flower]'\n"


def test_certificates_hold_for_the_hosts_and_keys_are_private(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flwr", reason="needs the extra `flower`")
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

    out = tmp_path / "certs"
    options = ["--host", "coordinator.example.org", "--host", "10.0.0.7", "--node", "hospital", "--node", "bank"]
    assert exit_code("flower", "certs", out, *options) == 0
    ca = x509.load_pem_x509_certificate((out / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((out / "server.pem").read_bytes())
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "coordinator.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "10.0.0.7"]
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    private = [out / "ca.key", out / "server.key", out / "nodes" / "hospital.key", out / "nodes" / "bank.key"]
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in private)
    key = load_ssh_private_key((out / "nodes" / "bank.key").read_bytes(), None)
    public = load_ssh_public_key((out / "nodes" / "bank.pub").read_bytes())
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.public_key() == public
    assert exit_code("flower", "certs", out) == 2
    assert "is not empty" in capsys.readouterr().err
    for wrong, expected in ((["--host", "no host"], "--host: got 'no host'"), (["--node", "../x"], "--node: got")):
        assert exit_code("flower", "certs", tmp_path / "other", *wrong) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.fixture
def interrupted(tmp_path: Path) -> RunDirectory:
    """The directory of a federation's run that has not finished."""
    opened = create(tmp_path / "run", load_config(TREE))
    opened.write_federation(
        {"app": str(tmp_path / "app"), "run_config": {"directory": "run", "overrides": "lora.rank=2"}}
    )
    return opened


def test_a_run_is_started_again_with_what_it_was_started_with(interrupted: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"its Flower app is not at .*app; say where it is with --app"):
        resume_command(interrupted, None, None)
    write_app(tmp_path / "app", load_config(TREE))
    command = resume_command(interrupted, "federation", None)
    assert command[:4] == ["flwr", "run", str(tmp_path / "app"), "federation"]
    assert command[-1] == 'directory="run" overrides="lora.rank=2"'
    write_app(tmp_path / "moved", load_config(TREE))
    assert resume_command(interrupted, None, tmp_path / "moved")[2] == str(tmp_path / "moved")


def test_a_run_that_flower_does_not_finish(
    interrupted: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flwr", reason="needs the extra `flower`")
    write_app(tmp_path / "app", load_config(TREE))
    said: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        said.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RunError, match="the run has not finished; flwr ended with 1"):
        resume(interrupted)
    assert said[0][0] == str(Path(sys.executable).parent / "flwr")
    interrupted.write_summary({"method": "fltac", "rounds": 1, "tasks": {}, "mean_score": None})
    assert resume(open_existing(interrupted.path))["rounds"] == 1
