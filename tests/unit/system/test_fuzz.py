"""A short run of `make fuzz` for what tpctl reads as root, and every input that it once did not bear."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.fuzz import host
from tests.fuzz.relay import Target, run
from tpctl.config import load as config
from tpctl.config.traffic import read_network
from tpctl.config.values import BadValueError, whole_number
from tpctl.persist import direct_xml
from tpctl.system.errors import InputError


@pytest.mark.parametrize("target", host.TARGETS, ids=lambda target: target.name)
def test_random_input_is_read_or_refused(target: Target) -> None:
    assert "no crash" in run(target, 400, seed=11)


@pytest.mark.parametrize("encoding", ["utf-tf-8", "no-such", "shift_jis", "utf-16", "cp037", "idna", "rot13"])
def test_direct_xml_in_an_encoding_that_is_not_its_own(encoding: str) -> None:
    content = f'<?xml version="1.0" encoding="{encoding}"?>\n<direct>\n</direct>\n'.encode()
    with contextlib.suppress(direct_xml.UnreadableError):
        assert direct_xml.without_ours(content) == content


def test_direct_xml_with_entities_that_stand_for_each_other() -> None:
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    content = f'<!DOCTYPE direct [<!ENTITY e0 "x">{entities}]>\n<direct><rule>&e11;</rule></direct>'.encode()
    with pytest.raises(direct_xml.UnreadableError, match="amplification"):
        direct_xml.without_ours(content)


def test_a_number_between_characters_that_only_strip_takes_for_space() -> None:
    assert whole_number("\x1f8") == 8
    with pytest.raises(BadValueError):
        read_network("fd00::/\x1f8\x1f9", lambda note: None)


def test_the_name_of_a_template_variable_in_a_message(tmp_path: Path) -> None:
    path = tmp_path / "dataplane.yaml"
    path.write_text("type: Dataplane\nname: {{ \x1b[1mname }}\n")
    with pytest.raises(InputError) as refused:
        config.load(flags={"dataplane_file": [str(path)]})
    assert "without a value: \\x1b[1mname" in str(refused.value)
