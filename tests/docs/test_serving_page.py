"""The serving page is true: its table of fields, and the files beside it."""

from __future__ import annotations

import configparser
import inspect
import json
import re
import shlex
from pathlib import Path

import click
import pytest

from tests.docs.pages import ROOT

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from fluxdeploy.cli import main  # noqa: E402
from fluxdeploy.cli.serve import command  # noqa: E402
from fluxdeploy.serve.images_api.bodies import REFUSED, EditBody, GenerationBody  # noqa: E402

PAGE = ROOT / "docs" / "serving.md"
FILES = ROOT / "docs" / "serving"

NOT_FIELDS = {"self", "extra_headers", "extra_query", "extra_body", "timeout", "request_options"}


def rows() -> dict[str, tuple[str, str]]:
    """Field to its owner and what is said of it."""
    found = re.findall(r"^\| `(\w+)` \| ((?:OpenAI|ours)[^|]*) \| (.*) \|$", PAGE.read_text(), re.M)
    return {name: (owner, said) for name, owner, said in found}


def fields_of_openai() -> set[str]:
    images = openai.resources.images.Images
    return {
        name
        for method in (images.generate, images.edit)
        for name in inspect.signature(method).parameters
    } - NOT_FIELDS


def test_the_table_has_every_field_of_openais_client_and_of_the_server() -> None:
    files = {"image", "mask", "control_image", "redux_image"}
    files |= {"ip_adapter_image", "negative_ip_adapter_image"}
    ours = {*GenerationBody.model_fields, *EditBody.model_fields, *files}
    assert fields_of_openai() <= set(rows()), "OpenAI's client has new fields"
    assert set(rows()) == ours | set(REFUSED)
    for name, (owner, said) in rows().items():
        assert said.startswith("no") == (name in REFUSED), name
        assert owner.startswith("OpenAI") == (name in fields_of_openai()), name
        only_edits = name not in GenerationBody.model_fields and name not in REFUSED
        assert owner.endswith("edits") or not only_edits, name


def options_of(arguments: list[str]) -> None:
    """Parse arguments of `fluxdeploy serve`; click raises where they are none."""
    # A command keeps the help option that its first context gives it.
    group = click.Context(main, info_name="fluxdeploy", **main.context_settings)
    command.make_context("serve", list(arguments), parent=group)


def test_the_unit_starts_the_server() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(FILES / "fluxdeploy.service")
    program, name, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert (Path(program).name, name) == ("fluxdeploy", "serve")
    options_of(arguments)


def test_the_image_starts_the_server() -> None:
    text = (FILES / "Dockerfile").read_text()
    program, name, *arguments = json.loads(text.partition("ENTRYPOINT ")[2])
    assert (program, name) == ("fluxdeploy", "serve")
    options_of(arguments)


def test_the_manifests_are_valid_for_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    yaml = pytest.importorskip("yaml")
    documents = list(yaml.safe_load_all((FILES / "kubernetes.yaml").read_text()))
    assert [each["kind"] for each in documents] == [
        "Deployment",
        "Service",
        "HorizontalPodAutoscaler",
    ]
    for document in documents:
        validate.validate(document, validate.latest_version(), strict=True)
    container = documents[0]["spec"]["template"]["spec"]["containers"][0]
    options_of(container["args"])


def test_the_dashboard_asks_for_series_that_there_are() -> None:
    from fluxdeploy.serve.images_api.local import FIGURES
    from fluxdeploy.serve.images_api.metrics import Metrics

    metrics = Metrics()
    for name in FIGURES:
        metrics.watch(name, "", lambda: 0.0)
    metrics.request("/", 200)
    metrics.drawn(1, 1, {"queued": 0.0}, 1.0, "high")
    there = set(re.findall(r"^(\w+)", metrics.text().decode(), re.M))
    texts = [(FILES / name).read_text() for name in ("grafana.json", "prometheus-adapter.yaml")]
    asked = {name for text in texts for name in re.findall(r"fluxdeploy_\w+", text)}
    assert asked - there == {"fluxdeploy_queue_seconds"}  # which the adapter makes
    assert len(json.loads(texts[0])["panels"]) == 6


def test_every_option_is_one_of_the_command() -> None:
    options = {option for each in command.params for option in each.opts}
    said = set(re.findall(r"`(--[a-z-]+)`", PAGE.read_text()))
    assert said <= options, said - options
    assert isinstance(command, click.Command)
