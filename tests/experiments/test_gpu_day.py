"""experiments/gpu_day.py without a GPU: its frame (a section that raises, time that is over, no
GPU), its checks on a CPU, with mutants that they must catch, and all of it on the stand-in GPU.

And `recr1 doctor --gpu`, which runs its first part.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recr1 import doctor

ROOT = Path(__file__).resolve().parents[2]
STANDIN = ROOT / "tests/gpu/standin"


@pytest.fixture
def day(monkeypatch):
    """Import the script, as it is imported when it runs."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import gpu_day

    return gpu_day


@pytest.fixture
def report_module(day):
    from gpu_sections import report

    return report


@pytest.fixture
def setting(day, tmp_path):
    """Tiny sizes on the CPU."""
    return day.Setting(torch.device("cpu"), True, tmp_path)


def run_script(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Run the script in a process that sees no GPU."""
    hidden = dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.run(
        [sys.executable, "-W", "ignore", "experiments/gpu_day.py", *arguments],
        cwd=ROOT,
        env=os.environ | hidden | env,
        capture_output=True,
        text=True,
        timeout=900,
    )


def read_results(out: str) -> dict[str, dict]:
    """Return the sections' lines of JSON by their names."""
    results = {}
    for line in out.splitlines():
        if line.startswith('{"section"'):
            result = json.loads(line)
            results[result["section"]] = result
    return results


# --- the frame ------------------------------------------------------------------------------------


def find_nothing(report, setting):
    """Raise after one bar."""
    report.at_most("before it raised", 1.0, 2.0)
    raise ZeroDivisionError("by nothing\nand a second line")


def need_more(report, setting):
    """Have nothing to work on."""
    from gpu_sections.report import CannotRun

    raise CannotRun("needs what is not here")


def miss_a_bar(report, setting):
    """Be too large, and not a number."""
    report.at_most("size", 3.0, 2.0)
    report.at_least("share", float("nan"), 0.5)
    report.at_least("held", 1.0, 0.5)


def hold(report, setting):
    """Hold."""
    print("what a section prints is no line of JSON")
    report.equals("exit code", 0, 0)
    report.figure("seconds", 1.23456)
    report.skip("a part", "it is not here\nat all")


def make_arguments(minutes: float = 1.0) -> SimpleNamespace:
    return SimpleNamespace(minutes=minutes, tiny=True, out=None)


def test_a_section_that_raises_is_its_own_result(day, report_module, setting, capsys):
    sections = [
        report_module.Section("first", report_module.CORRECTNESS, find_nothing),
        report_module.Section("second", report_module.CORRECTNESS, need_more),
        report_module.Section("third", report_module.SPEED, miss_a_bar),
        report_module.Section("last", report_module.CORRECTNESS, hold),
    ]

    results = day.run_sections(sections, setting, make_arguments())

    first, second, third, last = results
    assert first.status == "raised"
    assert first.why == "ZeroDivisionError: by nothing"
    assert [bar["name"] for bar in first.bars] == ["before it raised"]
    assert (second.status, second.why) == ("cannot run", "needs what is not here")
    assert (third.status, third.why) == ("not ok", "size; share")
    assert last.status == "ok"
    assert last.figures == {"seconds": 1.235}
    assert last.skipped == {"a part": "it is not here"}
    lines = read_results(capsys.readouterr().out)
    assert list(lines) == ["first", "second", "third", "last"]
    assert lines["third"]["bars"][1]["value"] == "nan"

    assert not day.is_correct(results)
    assert day.is_correct([second, third, last])  # a speed that is missed does not count
    bars = day.collect_bars(results)
    assert {"name": "first: runs to its end", "value": 0, "bar": 1, "ok": False} in bars
    assert sum(bar["ok"] for bar in bars) == 3
    summary = day.format_summary(results).splitlines()
    assert summary[0].split()[:2] == ["first", "raised"]
    assert summary[3].split() == ["last", "ok", "1", "of", "1", "bars"]


def test_no_section_begins_when_the_time_is_over(day, report_module, setting):
    def take_long(report, setting):
        """Take a tenth of a second."""
        time.sleep(0.1)

    sections = [
        report_module.Section("long", report_module.CORRECTNESS, take_long),
        report_module.Section("late", report_module.CORRECTNESS, hold),
    ]

    long, late = day.run_sections(sections, setting, make_arguments(minutes=0.05 / 60))

    assert long.status == "ok"  # what has begun ends
    assert late.status == "left out"
    assert "--only late" in late.why
    assert day.is_correct([long, late])


def test_without_time_all_is_left_out():
    done = run_script("--tiny", "--minutes", "0", "--only", "speed")

    assert done.returncode == 0, done.stderr
    results = read_results(done.stdout)
    assert results
    assert {result["status"] for result in results.values()} == {"left out"}
    assert done.stdout.splitlines()[-1] == '{"bars": []}'


def test_what_is_left_runs_in_a_new_process_when_cuda_has_ended(
    day, report_module, setting, monkeypatch, tmp_path
):
    """The new process knows the script's own sections: of another one it says that it ended."""
    sections = [report_module.Section("first", report_module.CORRECTNESS, find_nothing)]
    sections += [section for section in day.SECTIONS if section.name == "machine"]
    monkeypatch.setattr(day, "is_cuda_dead", lambda setting: True)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = make_arguments()
    arguments.out = str(tmp_path / "lines.jsonl")

    first, machine = day.run_sections(sections, setting, arguments)
    unknown = report_module.Section("unknown", report_module.CORRECTNESS, hold)
    [lost] = day.run_in_new_process([unknown], arguments, minutes=1.0)

    assert first.status == "raised"
    assert (machine.section, machine.status) == ("machine", "ok")
    assert machine.bars
    assert (lost.status, lost.why) == ("raised", "its process ended with exit code 2")
    lines = read_results((tmp_path / "lines.jsonl").read_text())
    assert list(lines) == ["first", "machine", "unknown"]


def test_the_list():
    done = run_script("--list")

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = [line.split()[0] for line in lines]
    assert len(set(names)) == len(names) >= 15
    kinds = [line.split()[1] for line in lines]
    assert sorted(kinds, key=["correctness", "speed", "two_gpus"].index) == kinds
    assert all(len(line.split()) > 6 for line in lines)  # what it shows


def test_without_a_gpu_one_line_and_2():
    done = run_script("--only", "machine")

    assert done.returncode == 2
    assert not done.stdout
    [line] = done.stderr.splitlines()
    assert "sees no GPU" in line
    assert "--tiny" in line


def test_results_are_added_to_the_file(day, report_module, tmp_path):
    path = tmp_path / "GPU_RESULTS.md"
    run = dict(when="now", device="a GPU", versions="torch 2", commit="abc+")
    bars = [dict(name="|sampler - trainer|", value=0.1, bar=0.2, ok=True)]
    results = [
        day.SectionResult("gap", "correctness", "ok", bars=bars, figures={"tokens": 3}),
        day.SectionResult("head", "correctness", "raised", why="Error: x"),
        day.SectionResult("late", "speed", "left out"),
    ]

    day.append_results(path, run, results)
    day.append_results(path, run, results)

    text = path.read_text()
    assert text.count("# Measured on GPUs") == 1
    rows = text.split("|---|\n")[1].splitlines()
    assert rows[0] == (
        r"| now | a GPU | torch 2 | abc+ | gap | \|sampler - trainer\| | 0.1 | 0.2 | yes |"
    )
    assert rows[1] == "| now | a GPU | torch 2 | abc+ | gap | tokens | 3 |  |  |"
    assert rows[2] == "| now | a GPU | torch 2 | abc+ | head | raised | Error: x |  | no |"
    assert len(rows) == 6


# --- the checks on a CPU --------------------------------------------------------------------------

ON_A_CPU = ["machine", "head", "sampling", "layer", "attention", "decode_attention", "gap"]


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_correctness_section_holds_on_a_cpu(name, day, setting):
    [section] = [section for section in day.SECTIONS if section.name == name]

    result = day.run_section(section, setting)

    assert result.status == "ok", (result.why, result.bars)
    assert result.bars


def test_tritons_kernels_hold_in_its_interpreter():
    pytest.importorskip("triton", reason="NOT TESTED: triton is not installed")

    done = run_script("--tiny", "--only", "head", "sampling", "layer", TRITON_INTERPRET="1")

    assert done.returncode == 0, done.stderr
    for result in read_results(done.stdout).values():
        names = [bar["name"] for bar in result["bars"]]
        assert any("triton" in name for name in names)
        assert not result["skipped"]


def change_ids(choose):
    """Return the next id in place of each that is chosen."""

    def run(*arguments, **options):
        chosen = choose(*arguments, **options)
        return chosen._replace(ids=chosen.ids + 1)

    return run


def scale_logp(head):
    """Return log-probs that are a twentieth too large in size."""

    def run(*arguments, **options):
        logp, entropy = head(*arguments, **options)
        return logp * 1.05, entropy

    return run


def forget_bias(attend):
    """Read the slots behind a row's last one too."""

    def run(q, k, v, bias):
        return attend(q, k, v, torch.zeros_like(bias))

    return run


def shift_logp(compute):
    """Return log-probs that are off by a fifth of a nat."""

    def run(*arguments, **options):
        logp, entropy = compute(*arguments, **options)
        return logp + 0.2, entropy

    return run


def turn_the_other_way(turn):
    """Turn by the opposite angle."""

    def run(x, rope):
        cos, sin = rope
        return turn(x, (cos, -sin))

    return run


MUTANTS = {
    "layer": ("layer_checks", "apply_rotary_emb", turn_the_other_way),
    "sampling": ("kernel_checks", "sample_token", change_ids),
    "head": ("kernel_checks", "linear_log_probs", scale_logp),
    "decode_attention": ("attention_checks", "attend_decode", forget_bias),
    "gap": ("sampling_checks", "compute_log_probs", shift_logp),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_section_sees_what_is_wrong(name, day, setting, monkeypatch):
    module_name, function_name, mutate = MUTANTS[name]
    module = sys.modules[f"gpu_sections.{module_name}"]
    function = getattr(module, function_name)
    monkeypatch.setattr(module, function_name, mutate(function))
    [section] = [section for section in day.SECTIONS if section.name == name]

    result = day.run_section(section, setting)

    assert result.status == "not ok"


def test_speeds_and_whole_runs_on_a_cpu():
    done = run_script("--tiny", "--minutes", "15", "--only", "dry_runs", "learning", "speed")

    results = read_results(done.stdout)
    for result in results.values():
        assert result["status"] in ("ok", "not ok"), (result, done.stderr)
    assert results["dry_runs"]["status"] == "ok"
    assert results["learning"]["status"] == "ok", results["learning"]
    assert results["step_speed"]["bars"]
    assert done.returncode == 0, done.stderr
    bars = json.loads(done.stdout.splitlines()[-1])["bars"]
    assert bars


def test_two_ranks_on_a_cpu():
    done = run_script("--tiny", "--minutes", "15", "--only", "two_gpus")

    results = read_results(done.stdout)
    assert done.returncode == 0, (results, done.stderr)
    assert results["two_ranks"]["status"] == "ok", results
    assert results["two_ranks"]["figures"]["float64: cases"] > 5
    assert results["overlap"]["status"] in ("ok", "not ok"), results  # a time, on a CPU
    assert results["killed_rank"]["status"] == "ok", results
    assert results["killed_rank"]["figures"]["exit code of the rank that is left"] == 3
    assert "rank 1" in results["killed_rank"]["figures"]["the last line of the rank that is left"]


# --- recr1 doctor --gpu ---------------------------------------------------------------------------

WITH_GPU = dict(torch=dict(gpus=[dict(name="G")]))


def write_stub(folder: Path, lines: list[dict], code: int = 0) -> Path:
    """Write a script that prints these lines of JSON, as gpu_day.py does."""
    path = folder / "experiments/gpu_day.py"
    path.parent.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(f"import sys\nsys.stdout.write({text!r})\nsys.exit({code})\n")
    return path


def test_the_doctor_without_a_gpu():
    done = subprocess.run(
        [sys.executable, "-m", "recr1.doctor", "--gpu", "--json"],
        env=os.environ | dict(CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=900,
    )

    assert done.returncode == 1
    *text, last = done.stdout.splitlines()
    [line] = [line for line in text if "--gpu" in line and line.startswith("BROKEN")]
    assert "torch sees no GPU here" in line
    assert json.loads(last)["facts"]["gpu_day"] == []


def test_the_doctor_where_experiments_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "GPU_DAY", tmp_path / "experiments/gpu_day.py")

    [finding] = doctor.check_gpu_day(dict(WITH_GPU))

    assert finding.broken
    assert "installed without experiments/" in finding.what
    assert "checkout" in finding.do


def test_the_doctor_tells_what_does_not_hold(tmp_path, monkeypatch):
    lines = [
        dict(section="machine", status="ok", why=""),
        dict(section="head", status="not ok", why="fused, triton: d_weight"),
        dict(section="graphs", status="raised", why="RuntimeError: no"),
        dict(section="attention", status="cannot run", why="needs more"),
        dict(section="learning", status="left out", why="over"),
        dict(bars=[]),
    ]
    monkeypatch.setattr(doctor, "GPU_DAY", write_stub(tmp_path, lines, 1))
    facts = dict(WITH_GPU)

    findings = list(doctor.check_gpu_day(facts))

    assert [finding.broken for finding in findings] == [True, True, False]
    assert "head does not hold (not ok): fused, triton: d_weight" in findings[0].what
    assert "--only head" in findings[0].do
    assert "graphs does not hold (raised): RuntimeError: no" in findings[1].what
    assert "learning was left out" in findings[2].what
    assert [result["section"] for result in facts["gpu_day"]] == [
        line["section"] for line in lines if "section" in line
    ]


def test_the_doctor_when_the_check_itself_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "GPU_DAY", write_stub(tmp_path, [], 2))

    [finding] = doctor.check_gpu_day(dict(WITH_GPU))

    assert finding.broken
    assert "exit code 2" in finding.what


def test_the_doctor_runs_what_gpu_day_has(day):
    """The arguments that the doctor gives are those that the script takes."""
    args = day.parse_arguments(["--only", "correctness", "--minutes", "2", "--no-record"])
    assert {section.kind for section in args.sections} == {"correctness"}


# --- the stand-in GPU -----------------------------------------------------------------------------

CANNOT_RUN_ON_A_STANDIN = {"one_rank"}  # NCCL


@pytest.mark.skipif(
    not STANDIN.exists() or shutil.which("g++") is None or torch.version.cuda is not None,
    reason="NOT TESTED: the stand-in GPU needs g++ and a torch without CUDA",
)
def test_all_sections_run_on_the_standin_gpu():
    program = (
        "import runpy, sys\n"
        "from gpu.standin.install import install\n"
        "install()\n"
        "sys.argv[0] = 'experiments/gpu_day.py'\n"
        "sys.path.insert(0, 'experiments')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    names = [
        *("correctness", "decode_speed", "head_speed", "training_speed", "step_speed"),
        "decode_parts",
    ]
    before = read_results_file()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, "--tiny", "--minutes", "30", "--only"]
        + names,
        cwd=ROOT,
        env=os.environ
        | dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), str(ROOT)])),
        capture_output=True,
        text=True,
        timeout=900,
    )

    results = read_results(done.stdout)
    assert done.returncode == 0, (results, done.stderr[-4000:])
    for name, result in results.items():
        if name in CANNOT_RUN_ON_A_STANDIN:
            assert result["status"] == "cannot run"
        elif result["kind"] == "correctness":
            assert result["status"] == "ok", result
        else:
            assert result["status"] in ("ok", "not ok"), result  # times mean nothing
    assert results["graphs"]["bars"]
    assert read_results_file() == before  # a stand-in is no GPU


def read_results_file() -> str | None:
    """Return what was measured on GPUs so far; None: nothing."""
    path = ROOT / "experiments/benchmarks/GPU_RESULTS.md"
    return path.read_text() if path.exists() else None
