"""What segue reads and sets inside uvicorn is there; `pyproject.toml` admits only versions for which this was run."""

from __future__ import annotations

import tomllib

import pytest
import uvicorn
from packaging.requirements import Requirement
from packaging.version import Version
from scenario import ROOT
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from segue.worker.uvicorn_internals import check_contract


@pytest.mark.parametrize("protocol", [HttpToolsProtocol, H11Protocol])
def test_what_is_read_of_uvicorn_is_there(protocol) -> None:
    assert check_contract(protocol) == []


def test_a_protocol_that_lacks_it_is_told_by_name() -> None:
    class Other(uvicorn.Server):
        pass

    assert any("on_response_complete" in line for line in check_contract(Other))


def test_uvicorn_has_an_upper_bound_and_the_installed_one_is_below_it() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    requirement = next(r for r in map(Requirement, dependencies) if r.name == "uvicorn")
    assert {each.operator for each in requirement.specifier} == {">=", "<"}
    assert requirement.specifier.contains(Version(uvicorn.__version__))
    assert not requirement.specifier.contains(Version("1.0"))
