"""Privacy: which endpoints lie on this machine, what credentialed data forbids, who can read a
private folder.
"""

from __future__ import annotations

import stat
from types import SimpleNamespace

import pytest

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.files import write_json
from mmedpo_utils.base.privacy import (
    agreement_sentence,
    check_endpoint,
    check_outputs,
    is_loopback,
    private_folder,
)

MIMIC = SimpleNamespace(name="mimic-cxr", credentialed=True)
SLAKE = SimpleNamespace(name="slake", credentialed=False)
REMOTE = "https://api.example.org/v1"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000/v1",
        "http://127.9.8.7/v1",
        "http://localhost:11434/v1",
        "https://LOCALHOST/v1",
        "http://[::1]:8000/v1",
        "http://[0:0:0:0:0:0:0:1]/v1",
    ],
)
def test_loopback_needs_no_agreement(url):
    assert is_loopback(url)
    check_endpoint(url, MIMIC, None)


@pytest.mark.parametrize(
    "url",
    [
        REMOTE,
        "http://10.0.0.1/v1",
        "http://192.168.1.2:8000/v1",
        "http://0.0.0.0:8000/v1",
        "http://127.0.0.1.example.org/v1",
        "http://localhost.example.org",
        "http://128.0.0.1",
        "http://[fe80::1]/v1",
        "http://127.1/v1",
        "http://2130706433/v1",
        "http://localhost./v1",
    ],
)
def test_everything_else_is_remote_and_refused_for_credentialed_data(url):
    assert not is_loopback(url)
    with pytest.raises(
        InputError, match="mimic-cxr is credentialed data.*nothing was sent"
    ) as caught:
        check_endpoint(url, MIMIC, None)
    assert agreement_sentence(MIMIC) in str(caught.value), (
        "the refusal prints the sentence to write"
    )
    check_endpoint(url, MIMIC, agreement_sentence(MIMIC))
    check_endpoint(url, SLAKE, None)


@pytest.mark.parametrize(
    "agreement",
    [
        "yes",
        agreement_sentence(SLAKE),
        agreement_sentence(MIMIC).lower(),
        agreement_sentence(MIMIC) + " ",
        "",
    ],
)
def test_only_the_exact_sentence_for_this_data_set_counts(agreement):
    with pytest.raises(InputError, match="exactly"):
        check_endpoint(REMOTE, MIMIC, agreement)


def test_a_card_that_says_nothing_is_taken_as_credentialed():
    with pytest.raises(InputError, match="credentialed"):
        check_endpoint(REMOTE, SimpleNamespace(name="new", credentialed=None), None)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1@api.example.org/v1",
        "http://127.0.0.1:8000\\@api.example.org/v1",
        "http://me:secret-key@127.0.0.1/v1",
        "http://127.0.0.1/v1?key=secret-key",
        "ftp://127.0.0.1",
        "127.0.0.1:8000",
        "http://127.0.0.1/v1#x",
        "http:// 127.0.0.1",
        "http://127.0.0.1\n.example.org",
        "http://127.0.0.1/v1\n",
        "",
    ],
)
def test_an_address_that_could_be_read_in_two_ways_is_refused_without_printing_it(url):
    with pytest.raises(InputError, match="base_url is not a plain address") as caught:
        is_loopback(url)
    assert "secret-key" not in str(caught.value)


def test_a_private_folder_and_its_files_are_the_owners_alone(tmp_path):
    open_to_all = tmp_path / "cache"
    open_to_all.mkdir(mode=0o777)
    open_to_all.chmod(0o777)
    assert stat.S_IMODE(private_folder(open_to_all).stat().st_mode) == 0o700
    assert stat.S_IMODE(private_folder(tmp_path / "deep" / "new").stat().st_mode) == 0o700
    write_json(open_to_all / "a.json", [1], mode=0o600)
    assert stat.S_IMODE((open_to_all / "a.json").stat().st_mode) == 0o600
    write_json(tmp_path / "b.json", [1])
    assert stat.S_IMODE((tmp_path / "b.json").stat().st_mode) == 0o644
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made private"):
        private_folder(tmp_path / "file")


def test_outputs_of_credentialed_data_stay_in_the_run_folder(tmp_path):
    output, inside, outside = tmp_path / "run", tmp_path / "run" / "figures", tmp_path / "figures"
    check_outputs(MIMIC, output, inside, in_place=False)
    check_outputs(SLAKE, output, outside, in_place=True)
    with pytest.raises(InputError, match="mimic-cxr is credentialed data.*without --in-place"):
        check_outputs(MIMIC, output, inside, in_place=True)
    with pytest.raises(InputError, match="mimic-cxr is credentialed data.*`figures`"):
        check_outputs(MIMIC, output, outside, in_place=False)
