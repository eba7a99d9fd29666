"""The report: its document, and the page that shows it, opened in a browser where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.config.load import dump_config
from miles_spmd.telemetry.environment import write_environment
from miles_spmd.telemetry.metrics import describe
from miles_spmd.telemetry.report import CURVES, headline, make_page, read_stages, report_data, write_report
from miles_spmd.telemetry.stragglers import Row, Stragglers, write_stragglers
from miles_spmd.telemetry.trackers import open_trackers
from miles_spmd.telemetry.transcripts import write_rollout, write_transcripts
from tests.telemetry.runs import make_config, make_run, sample

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no browser here")

SCRIPT = "two plus two & <script>document.title = 'broken'</script>"  # the prompt of every run here


class Page(HTMLParser):
    """Text, tags and attribute values of a page, scripts apart; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.names: list[str] = []  # of drawings, for those who do not see them
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.names += [value or "" for name, value in attrs if tag == "svg" and name == "aria-label"]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.text += data

    @property
    def document(self) -> dict[str, Any]:
        """What is embedded in the page."""
        return json.loads(self.scripts[0])


def in_browser(path: Path, profile: Path) -> Page:
    """The page as a browser understands it, after running whatever would run; fails where its script fails."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=2000 --enable-logging=stderr --dump-dom"
    )
    command = [BROWSER or "", *flags.split(), f"--user-data-dir={profile}", f"file://{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ":CONSOLE" not in done.stderr, done.stderr
    return Page(done.stdout)


@pytest.fixture
def two_stages(tmp_path: Path) -> Path:
    root = tmp_path / "quick <start>"
    make_run(make_config(root, run={"name": "sft", "output_dir": root, "num_rollout": 5, "mode": "sft"}), 5)
    make_run(make_config(root, run={"name": "grpo", "output_dir": root, "num_rollout": 20}), 20)
    return root


def test_a_report_holds_everything_itself(two_stages: Path) -> None:
    text = write_report(two_stages).read_text()
    page = Page(text)
    assert not page.links
    assert not re.findall(r"url\(|@import|\bimport\(|fetch\(", text)
    assert "default-src 'none'" in text
    assert page.tags.count("script") == 2
    assert not {"img", "link", "iframe", "i"} & set(page.tags)
    assert "</script" not in page.scripts[0]
    assert "<" not in page.scripts[0]
    data = page.document
    assert data | {"written": ""} == json.loads(json.dumps(report_data(two_stages))) | {"written": ""}
    assert (data["title"], data["finished"]) == ("quick <start>", True)
    sft, grpo = data["stages"]
    assert (sft["summary"], grpo["summary"]) == (
        "mode sft · 5 of 5 steps · 0:14, 0:08 of it to start",
        "mode rl · 20 of 20 steps · 0:33, 0:08 of it to start",
    )
    assert grpo["series"]["eval/sums"] == [[0, 0.25], [20, 0.75]]
    assert len(grpo["series"]["train/kl_loss"]) == 20
    ((first, last),) = grpo["transcripts"]
    assert (first["step"], first["response"], last["step"], last["response"]) == (0, "<i>3</i>", 20, "<i>4</i>")
    assert first["prompt"] == SCRIPT
    assert 'hf_checkpoint = "checkpoint"' in grpo["config"]
    assert data["environment"]["packages"]["sglang"] == "0.5.16"
    assert data["scores"] == ["eval/sums"]
    described = {name for name, metric in data["metrics"].items() if metric["meaning"]}
    assert described == set(sft["series"]) | set(grpo["series"])
    assert all(describe(metric).meaning for curves in CURVES for metric in curves.lines.values())


@needs_browser
def test_a_browser_shows_it(two_stages: Path, tmp_path: Path) -> None:
    page = in_browser(write_report(two_stages), tmp_path / "profile")
    assert page.text.count("quick <start> · miles_spmd") == 1  # the title: no transcript ran as a script
    assert page.tags.count("script") == 2
    assert not {"img", "link", "iframe", "i"} & set(page.tags)
    assert page.text.count(SCRIPT) == 2
    assert page.text.index("<i>3</i>") < page.text.index("<i>4</i>")
    assert page.tags.count("svg") == len(page.names) > 12
    for words in (
        "finished",
        "75.0%",
        "25.0% → 75.0% → 75.0%",
        "5 + 20",
        "3.0e-06",
        "Time per phase",
        "KL to the reference",
        'hf_checkpoint = "checkpoint"',
        "Global norm of the gradient before clipping",
    ):
        assert words in page.text, words
    assert "Reward: reward 0.325 at step 1, 0.8 at step 20, between 0.325 and 0.8" in page.names
    assert "NaN" not in "".join(page.names) + page.text


@needs_browser
def test_a_browser_shows_series_of_every_shape(two_stages: Path, tmp_path: Path) -> None:
    """Empty, of one point, constant, long, not finite, of an unknown metric; then no data at all."""
    data = report_data(two_stages)
    series = data["stages"][1]["series"]
    series |= {
        "rollout/raw_reward": [],
        "train/loss": [[3, 1e-30]],
        "train/kl_loss": [[step, float("nan") if step % 2 else -1e12] for step in range(10)],
        "train/entropy_loss": [[1, float("nan")]],
        "train/grad_norm": [[step, step % 7] for step in range(3000)],
        "train/train_rollout_logprob_abs_diff": [[1, 0.0], [2, 0.0]],
        "plugin/</script>": [[1, 5.0]],
    }
    data["metrics"]["plugin/</script>"] = {"unit": "<b>", "meaning": ""}
    path = tmp_path / "page.html"
    path.write_text(make_page(data))
    page = in_browser(path, tmp_path / "profile")
    names = {name.partition(":")[0]: name for name in page.names[len(page.names) // 2 :]}
    assert {"Reward", "Entropy"} & set(names) == set()
    assert names["Loss"] == "Loss: loss 1.0e-30 at step 3, 1.0e-30 at step 3, between 1.0e-30 and 1.0e-30"
    assert names["KL to the reference"].startswith("KL to the reference: kl -1.0e+12 at step 0, -1.0e+12 at step 8")
    assert "step 2999" in names["Gradient norm"]
    assert "b" not in page.tags
    path.write_text(make_page(None))
    assert "svg" not in in_browser(path, tmp_path / "profile").tags


@needs_browser
def test_the_time_of_each_rank_is_a_table(two_stages: Path, tmp_path: Path) -> None:
    rows = [
        Row("log_probs", [2, 3], ["node-a", "node-b"], ["GPU 0", ""], 0.25, 1.5, 1.62, True),
        Row("log_probs", [0, 1], ["node-<b>"], [], 0.125, 0.5, 1.0, False),
    ]
    write_stragglers(two_stages / "grpo", Stragglers(3, 20, rows))
    opened = "<script>for (const summary of document.querySelectorAll('summary')) summary.click()</script>"
    path = tmp_path / "page.html"
    path.write_text(write_report(two_stages).read_text() + opened)
    page = in_browser(path, tmp_path / "profile")
    assert "of steps 3 to 20" in page.text
    cells = "phaseranksmedian slongest sratiowhere" + "log probs2, 30.251.51.62 (slow)node-a, node-b; GPU 0"
    assert f"{cells}log probs0, 10.1250.51node-<b>" in page.text
    assert "b" not in page.tags


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(two_stages: Path, tmp_path: Path, width: int) -> None:
    page = html.escape(write_report(two_stages).read_text())
    root = "document.querySelector('iframe').contentDocument.documentElement"
    measure = f"document.title = {root}.scrollWidth - {root}.clientWidth"
    frame = f'<iframe style="border: 0; width: {width}px; height: 900px" onload="{measure}" srcdoc="{page}"></iframe>'
    path = tmp_path / "frame.html"
    path.write_text(f"<!doctype html><title></title>{frame}")
    assert in_browser(path, tmp_path / "profile").text.strip() == "0"


@needs_browser
def test_scores_have_their_own_scale(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    make_run(config, 20)
    with open_trackers(config) as tracker:
        for step in (0, 10, 20):
            tracker.log(step, {"eval/length": 3.08 + step, "train/pg_clipfrac": 0.0})
    numbers = {number.label: number.value for number in headline(read_stages(tmp_path))}
    assert numbers["Held-out score, length"] == "23.1"
    assert numbers["Held-out accuracy, sums"] == "75.0%"
    page = in_browser(write_report(tmp_path), tmp_path / "profile")
    assert "Held-out score, length: length 3.08 at step 0, 23.1 at step 20, between 3.08 and 23.1" in page.names
    assert "Held-out accuracy: sums 0.25 at step 0, 0.75 at step 20, between 0.25 and 0.75" in page.names
    assert any(name.startswith("Held-out pass@k: sums-pass@4 0.5 at step 0") for name in page.names)
    assert any(name.startswith("Rewards of the samples: step 1 ") for name in page.names)
    assert "0 in all steps: Clipped tokens" in page.text
    assert "Step 20: best reward 2, worst 0" in page.text


def test_an_evaluation_of_its_own(tmp_path: Path) -> None:
    config = make_config(tmp_path, run={"name": "grpo-eval", "output_dir": tmp_path, "num_rollout": 6})
    config.run_dir.mkdir()
    (config.run_dir / "config.toml").write_text(dump_config(config))
    write_environment(config.run_dir, "eval")
    with open_trackers(config) as tracker:
        tracker.log(4, {"eval/sums": 0.75, "perf/step_time": 8.0})
    data = Page(write_report(config.run_dir).read_text()).document
    assert (data["finished"], data["evaluation"]) == (True, True)
    assert data["stages"][0]["summary"] == "mode rl · evaluation after 4 steps · 0:08"
    assert [(number["label"], number["value"]) for number in data["numbers"]] == [
        ("Held-out accuracy, sums", "75.0%"),
        ("Time", "0:08"),
    ]


@pytest.mark.parametrize("name", ["metrics.jsonl", "transcripts.jsonl", "rollouts.jsonl"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    """A line in the middle is cut, one is no UTF-8, and the last one is incomplete."""
    config = make_config(tmp_path)
    make_run(config, 5)
    file = config.run_dir / name
    good = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(good[0][:-9] + b"\n" + b"".join(good[1:]) + b'{"step": \xff}\n' + good[-1][:9])
    problems: list[str] = []
    write_report(tmp_path, problems.append)
    count = len(good) + 2
    expected = f"{file}: 3 of {count} lines cannot be read: line 1, {count - 1}, {count}; the last one is incomplete: "
    assert [problem[: len(expected)] for problem in problems] == [expected]
    assert json.loads(Page((tmp_path / "report.html").read_text()).scripts[0])["problems"] == problems


def test_missing_steps_are_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    make_run(config, 5)
    file = config.run_dir / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2] + lines[4:]))
    problems: list[str] = []
    write_report(tmp_path, problems.append)
    assert problems == [f"{file}: has no metrics of 2 steps: 2 to 3"]
    file.write_bytes(b"".join(lines) + b'{"step": 9000000000}\n')  # a digit more makes a gap, not a long wait
    write_report(tmp_path, problems.append)
    assert problems[1] == f"{file}: has no metrics of 8999999994 steps: 6 to 8999999999"


def test_no_control_character_reaches_the_page(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    make_run(config, 2)
    with open_trackers(config) as tracker:
        tracker.log(3, {"rollout/\x1b[31mred": 1.0})
    write_transcripts(config, 3, {"\x9bset": [[sample("\x1b]0;title\x07\u202e" + "long " * 10**6, reward=1.0)]]})
    write_rollout(config, 3, [[sample("\x00" + "long " * 10**6, reward=1.0)]])
    text = write_report(tmp_path).read_text()
    assert len(text) < 600_000
    page = json.dumps(Page(text).document, ensure_ascii=False)
    assert not re.findall("[\x00-\x1f\x7f-\x9f\u202a-\u202e]|u00[019]|u202", page.replace("\\\\u202e", ""))
    assert "\\\\x1b]0;title\\\\x07" in page


def test_a_run_that_was_killed(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    make_run(config, 7)
    with (config.run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "train/loss": 0.')
    with (config.run_dir / "transcripts.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "sou')
    (config.run_dir / "config.toml").write_text((config.run_dir / "config.toml").read_text() + "[half")
    (stage,) = Page(write_report(config.run_dir).read_text()).document["stages"]
    assert stage["summary"] == "7 steps · 0:17, 0:08 of it to start · not finished"
    (config.run_dir / "config.toml").write_text("[run]\nnum_rollout = 20\n")
    (stage,) = Page(write_report(config.run_dir).read_text()).document["stages"]
    assert stage["summary"] == "7 of 20 steps · 0:17, 0:08 of it to start · not finished"


def test_a_run_of_which_only_metrics_are_left(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "train/loss": 2.0}\n')
    (stage,) = Page(write_report(tmp_path).read_text()).document["stages"]
    assert stage["series"] == {"train/loss": [[1, 2.0]]}
    assert stage["summary"] == "1 steps · 0:00 · not finished"


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no metrics.jsonl"):
        write_report(tmp_path)


def test_headline_numbers(two_stages: Path) -> None:
    numbers = {number.label: (number.value, number.note) for number in headline(read_stages(two_stages))}
    assert numbers["Time"] == ("0:47", "0:14 + 0:33")
    assert numbers["Refit checksum mismatches"] == ("0", "in 25 refits")
    assert numbers["Tokens with two log-probs"] == ("50", "of 19,200 compared bitwise")
    assert numbers["Reward of the last step"] == ("0.8", "first step 0.325")
