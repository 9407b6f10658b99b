"""What may leave this machine: where an endpoint lies, what a dataset card allows, and folders that
only their owner reads.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from .errors import InputError
from .files import refuse_link

# The one form of address that is taken. It lists what may be there instead of asking a parser:
# urlsplit drops tabs and line breaks and takes user names, queries and escapes, and another parser
# (the HTTP client's) may find another host in such an address.
ENDPOINT = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:\d{1,5})?(/[\w./~-]*)?")


def endpoint_host(base_url: str) -> str:
    """The host of an endpoint's address, in lower case, without port and brackets.

    Raises:
        InputError: not a plain http(s) address; user names, keys, queries and escapes in it are
            refused.
    """
    match = ENDPOINT.fullmatch(base_url)
    if match is None:
        raise InputError(
            "profile section `judge`: a base_url is not a plain address; expected one like "
            "http://127.0.0.1:8000/v1, without user name, key, query or escapes"
        )
    return match[1].strip("[]").lower()


def is_loopback(base_url: str) -> bool:
    """Whether an endpoint lies on this machine: localhost, 127.0.0.0/8 or ::1. Raises InputError:
    not an address.
    """
    host = endpoint_host(base_url)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Card(Protocol):
    """What is read of a dataset card: the data set's name, and whether its users are credentialed
    for it.
    """

    @property
    def name(self) -> str:
        """The data set's name."""

    @property
    def credentialed(self) -> bool | None:
        """Whether its users are credentialed; None where nobody has said."""


def agreement_sentence(card: Card) -> str:
    """The sentence by which the reader states, in the profile, that the data set's agreement allows
    remote judges.
    """
    return (
        f"I have checked my data use agreement: it allows sending texts of {card.name} to the "
        "endpoints that this profile names."
    )


def check_endpoint(base_url: str, card: Card, agreement: str | None) -> None:
    """Refuse an endpoint outside this machine for credentialed data, unless the reader has stated
    that it is allowed.

    Args:
        agreement: the profile's ``judge.agreement``.

    Raises:
        InputError: the endpoint is remote, the card does not say that the data is free to share,
            and the sentence is not there word by word.
    """
    sentence = agreement_sentence(card)
    if not is_loopback(base_url) and card.credentialed is not False and agreement != sentence:
        raise InputError(
            f"{card.name} is credentialed data, and {endpoint_host(base_url)} is not this machine: "
            "nothing was sent. Use an endpoint on 127.0.0.1, or, if your data use agreement allows "
            f"it, write into the profile's key `judge.agreement` exactly: {sentence}"
        )


# Patient and study as folders or, flattened, as parts of a name; or the name that MIMIC-CXR gives
# an image: five groups of eight hexadecimal digits, a form that nothing else has.
MIMIC_IMAGE = re.compile(
    r"(?<![0-9A-Za-z])p1[0-9][/\\_]+p1[0-9]{7}[/\\_]+s5[0-9]{7}(?![0-9])"
    r"|(?<![0-9a-f])[0-9a-f]{8}(?:-[0-9a-f]{8}){4}(?![0-9a-f])"
)


def is_mimic(text: str) -> bool:
    """Whether an image's name, or a text that holds one, is named like MIMIC-CXR's images."""
    return MIMIC_IMAGE.search(text) is not None


def check_origin(card: Card, names: Iterable[str], source: object) -> None:
    """Refuse MIMIC-CXR's rows under another data set's card, whose terms would let them leave the
    machine.

    A preference file of MIMIC-CXR is credentialed text wherever it was downloaded. Its images are
    known by their names (`is_mimic`).

    Args:
        names: images, as the rows name them.
        source: the file or folder that the rows come from.

    Raises:
        InputError: an image is named like MIMIC-CXR's, and the card says that the data is free to
            share.
    """
    if card.credentialed is not False:
        return
    for name in names:
        if is_mimic(name):
            raise InputError(
                f"{source}: its images are named like MIMIC-CXR's ({name[:60]}), whose texts are "
                "credentialed; write `card: mimic-cxr` into the profile's section `data`, so that "
                "its terms hold"
            )


def check_outputs(card: Card, output: Path, figures: Path, in_place: bool) -> None:
    """Keep what notebooks show of credentialed data, texts and images, out of folders that get
    committed.

    Args:
        output, figures: the profile's folders.
        in_place: whether the executed notebooks and their figures shall be written over the
            committed ones.

    Raises:
        InputError: the card does not say that the data is free to share, and notebooks or figures
            would leave ``output``.
    """
    if card.credentialed is False:
        return
    if in_place:
        raise InputError(
            f"{card.name} is credentialed data: executed notebooks hold texts and images of it, so "
            "that they stay in the run folder; run without --in-place"
        )
    # Resolved: a link in the run folder may lead out of it.
    if not figures.resolve().is_relative_to(output.resolve()):
        raise InputError(
            f"{card.name} is credentialed data: its figures stay in the run folder; set the "
            f"profile's key `figures` to a folder under `output` ({output.name})"
        )


def private_folder(path: str | os.PathLike) -> Path:
    """Make a folder (if absent) that only its owner can list, read or write (mode 0700), and return
    its path.

    Raises:
        InputError: it cannot be made, belongs to someone else, or is a link: the folder that it
            leads to would become private.
    """
    folder = Path(path)
    refuse_link(folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be made private ({error.strerror or error}); choose another folder "
            "with the profile's `output`"
        ) from error
    return folder
