"""The report, opened in a browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from miles_spmd.telemetry.report import headline, write_report
from miles_spmd.telemetry.run_data import read_stages
from tests.telemetry.runs import make_config, make_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Text, tags and attribute values of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def in_browser(path: Path, profile: Path) -> str:
    """The page as a browser understands it, after running whatever would run."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=2000 --dump-dom"
    )
    command = [BROWSER or "", *flags.split(), f"--user-data-dir={profile}", f"file://{path}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def two_stages(tmp_path: Path) -> Path:
    root = tmp_path / "quick <start>"
    make_run(make_config(root, run={"name": "sft", "output_dir": root, "num_rollout": 5, "mode": "sft"}), 5)
    make_run(make_config(root, run={"name": "grpo", "output_dir": root, "num_rollout": 20}), 20)
    return root


def test_a_report_holds_everything_itself(two_stages: Path, tmp_path: Path) -> None:
    text = write_report(two_stages).read_text()
    page = Page(text)
    assert all(link.startswith("#") for link in page.links), page.links
    assert not re.findall(r"url\((?!#)|@import", text)
    assert page.tags.count("svg") > 12
    assert not {"script", "img", "link", "iframe", "i"} & set(page.tags)
    for words in (
        "finished",
        "75.0%",
        "25.0% → 75.0% → 75.0%",
        "5 + 20",
        "3.0e-06",
        "Time per phase",
        "KL to the reference",
    ):
        assert words in page.text, words
    assert "two plus two & <script>document.title = 'broken'</script>" in page.text
    assert page.text.index("<i>3</i>") < page.text.index("<i>4</i>")
    assert 'hf_checkpoint = "checkpoint"' in page.text
    assert "sglang0.5.16" in re.sub(r"\s", "", page.text)
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    for drawing in drawings:  # what a drawing refers to is in itself
        assert set(re.findall(r"url\(#([^)]+)\)", drawing)) <= set(re.findall(r'id="([^"]+)"', drawing))
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
def test_a_browser_shows_it(two_stages: Path, tmp_path: Path) -> None:
    page = Page(in_browser(write_report(two_stages), tmp_path / "profile"))
    assert "quick <start> · miles_spmd" in page.text  # the title: no transcript ran as a script
    assert "script" not in page.tags
    assert page.tags.count("svg") > 12


def test_a_run_that_was_killed(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    make_run(config, 7)
    with (config.run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "train/loss": 0.')
    with (config.run_dir / "transcripts.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "sou')
    page = Page(write_report(config.run_dir).read_text())
    assert "not finished" in page.text
    assert "7 of 20" in page.text


def test_a_run_of_which_only_metrics_are_left(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "train/loss": 2.0}\n')
    page = Page(write_report(tmp_path).read_text())
    assert page.tags.count("svg") == 1
    assert "1 of None" not in page.text


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no metrics.jsonl"):
        write_report(tmp_path)


def test_headline_numbers(two_stages: Path) -> None:
    numbers = {number.label: (number.value, number.note) for number in headline(read_stages(two_stages))}
    assert numbers["Time"] == ("0:47", "0:14 + 0:33")
    assert numbers["Refit checksum mismatches"] == ("0", "in 25 refits")
    assert numbers["Tokens with two log-probs"] == ("50", "of 19,200 that were compared, to the last bit")
    assert numbers["Reward of the last step"] == ("0.8", "first step 0.325")
