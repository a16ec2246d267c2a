"""The specification of evidence/, as sentences: `python -m pytest evidence -v` prints it."""

import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from operator import mul
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rs_grpo
from evidence import compare, pretrain, report, variants
from rs_grpo import TASKS, BadInput, Config, Rollouts
from test_rs_grpo import ROOT, group, parametrize

LINES = [json.loads(line) for line in compare.STORE.open()]


# --- The embedded model ---------------------------------------------------------------------------
def share_of_chains(texts):
    return sum(not set(text) & set("*/") for text in texts) / len(texts)


def test_nineteen_in_twenty_expressions_that_the_base_learns_from_are_chains():
    rng = random.Random(1)
    learned = [pretrain.example(rng)[1] for _ in range(4000)]
    assert 0.94 < share_of_chains(learned) < 0.97


def test_three_in_four_answers_of_the_base_are_chains():
    config = Config()
    task = TASKS["countdown"](config)
    policy = rs_grpo.load_policy(config, task)
    generator = torch.Generator().manual_seed(0)
    rollouts = rs_grpo.roll_out(policy, task, task.held_out, 16, config, generator)
    assert 0.72 < share_of_chains(rollouts.texts) < 0.82


def test_chains_cannot_solve_two_thirds_of_the_problems():
    task = TASKS["countdown"](Config())
    signs = list(itertools.product((1, -1), repeat=4))
    solved = []
    for _, (numbers, target) in task.train + task.held_out:
        sums = [sum(map(mul, sign, numbers)) for sign in signs]
        solved.append(target in sums)
    assert 0.28 < sum(solved) / len(solved) < 0.38


# --- Variants -------------------------------------------------------------------------------------
@parametrize("name", variants.METHODS)
def test_every_method_has_settings_that_rs_grpo_accepts(name):
    line = compare.begin("main", "countdown", name, 0, {})
    rs_grpo.check_config(variants.METHODS[name].config_class(**line["settings"]))


def test_rescaled_advantages_have_one_mean_size():
    advantages = rs_grpo.grpo_advantage(torch.cat([group(1), group(8), group(16)]))
    assert variants.rescaled(advantages).abs().mean().item() == pytest.approx(variants.SCALE)


def test_rescaled_advantages_keep_their_proportions_and_their_zeros():
    advantages = rs_grpo.grpo_advantage(torch.cat([group(1), group(8), group(16)]))
    scaled = variants.rescaled(advantages)
    factor = scaled[0, 0] / advantages[0, 0]
    assert torch.allclose(scaled, factor * advantages) and not scaled[2].any()


def test_a_batch_without_a_signal_stays_without_one_when_rescaled():
    assert not variants.rescaled(torch.zeros(2, 4)).any()


@parametrize("correct", [1, 4])
def test_the_beta_of_constant_kl_weighs_a_group_by_ln_2(correct):
    """KL(softmax(βr) ‖ uniform) written out for so many ones of 16."""
    beta = variants.beta_of_constant_kl(group(correct)).item()
    total = correct * math.exp(beta) + 16 - correct
    right = math.exp(beta) / total
    wrong = 1 / total
    kl = correct * right * math.log(16 * right) + (16 - correct) * wrong * math.log(16 * wrong)
    assert kl == pytest.approx(math.log(2))


@parametrize("correct", [8, 15, 0, 16])
def test_the_beta_of_constant_kl_is_capped_where_no_beta_reaches_ln_2(correct):
    assert variants.beta_of_constant_kl(group(correct)).item() == pytest.approx(variants.MOST_BETA)


def test_the_beta_of_accuracy_falls_from_8_to_0():
    rewards = torch.cat([group(0), group(4), group(16)])
    assert variants.beta_of_accuracy(rewards).flatten().tolist() == [8, 6, 0]


def test_the_annealed_beta_falls_from_8_to_0_over_the_run(monkeypatch):
    monkeypatch.setattr(rs_grpo, "collect", lambda policy, task, config, *rest: config.beta)
    states = [SimpleNamespace(step=step) for step in range(4)]
    config = Config(steps=4)
    betas = [variants.collect_annealed(None, None, config, state, None) for state in states]
    assert betas == [8, 6, 4, 2]


@parametrize("text, value", [("9*7-12-4", 47), ("4*12+9-7", 50), ("4*(7+9)/12", 16 / 3)])
def test_partial_credit_is_the_less_the_farther_from_the_target(text, value):
    credit = variants.partial_credit(text, ((4, 7, 9, 12), 48))
    assert credit == pytest.approx(0.5 / (1 + abs(value - 48)))


def test_the_target_itself_earns_1():
    assert variants.partial_credit("12*7-9*4", ((4, 7, 9, 12), 48)) == 1


@parametrize("text", ["4*12", "4*12+9-7-7", "48", "9**7-12-4", "4/(12-9-7)-", "9/(12-4-7-1)"])
def test_what_is_no_expression_over_the_numbers_earns_no_credit(text):
    assert variants.partial_credit(text, ((4, 7, 9, 12), 48)) == 0


# --- The file of runs -----------------------------------------------------------------------------
def test_no_run_is_in_the_file_twice():
    assert max(Counter(map(compare.identity, LINES)).values()) == 1


def test_every_line_counts_correct_and_different_answers_of_256_problems():
    for line in LINES:
        assert len(line["correct"]) == len(line["distinct"]) == 256
        for correct, distinct in zip(line["correct"], line["distinct"]):
            assert 0 <= distinct <= correct <= line["n"] and bool(distinct) == bool(correct)


def test_every_line_says_who_made_it():
    made = ("command", "commit", "machine", "versions", "seconds")
    assert [line for line in LINES if not set(made) <= line.keys()] == []


# --- The report -----------------------------------------------------------------------------------
def lines_of(counts, n=4, lr=5e-5, **settings):
    """Lines with these counts: for each method a list of problems for each seed."""
    lines = []
    for method, seeds in counts.items():
        for seed, correct in enumerate(seeds):
            plan = {"steps": 0 if method == "base" else 800, "lr": lr} | settings
            line = {"method": method, "seed": seed, "n": n, "correct": correct, "settings": plan}
            lines.append(line | {"testbed": "countdown", "series": "main", "seconds": 60})
    return lines


@pytest.fixture(scope="module")
def results():
    return report.results(LINES)


def test_results_md_is_what_the_report_writes_byte_for_byte(results):
    assert results[0] == (ROOT / "evidence/RESULTS.md").read_text()


def test_every_figure_of_the_page_is_drawn(results):
    page, figures = results
    assert re.findall(r"\]\(\.\./figures/(.*)\.png\)", page) == list(figures)


@parametrize("i, k", [(0, 1), (1, 2), (2, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(i, k):
    runs = report.Runs(lines_of({"base": [[0, 1], [4, 2]]}))
    subsets = list(itertools.combinations(range(4), k))
    shares = []
    for correct in (0, 1, 4, 2):
        shares.append(100 * sum(min(subset) < correct for subset in subsets) / len(subsets))
    assert runs.pass_at_k("base")[..., i].flatten().tolist() == pytest.approx(shares)


def test_a_cell_is_the_mean_and_its_standard_error_over_seeds():
    assert report.cell(np.array([12.5, 75.0])) == "43.8 ± 31.2"  # the error: half their distance


RNG = random.Random(0)
THEIRS = [[RNG.randint(0, 2) for _ in range(400)] for _ in range(3)]


def difference(ours):
    """Mean, low and high of pass@1, in points."""
    runs = report.Runs(lines_of({"base": THEIRS, "grpo": THEIRS, "rs2": ours}))
    mean, (low, high) = runs.difference("rs2", "grpo")
    return mean[0], low[0], high[0]


def test_the_interval_of_a_difference_resamples_problems():
    gain = [RNG.randint(0, 2) for _ in range(400)]  # the same in every seed
    mean, low, high = difference([[a + g for a, g in zip(seed, gain)] for seed in THEIRS])
    points = torch.tensor(gain, dtype=torch.float64) * 25
    spread = 1.96 * points.std().item() / 400**0.5
    assert mean == pytest.approx(points.mean().item())
    assert (mean - low, high - mean) == pytest.approx((spread, spread), abs=0.15)


def test_the_interval_of_a_difference_resamples_seeds():
    """Seeds gain 0, 25 and 50 points: one in 27 draws takes the same extreme seed thrice."""
    unequal = [[a + s for a in seed] for s, seed in enumerate(THEIRS)]
    assert difference(unequal) == pytest.approx((25, 0, 50))


def test_differences_are_of_equal_seeds_in_whatever_order_they_stand():
    lines = lines_of({"base": THEIRS, "grpo": THEIRS})
    twins = [line | {"method": "rs2"} for line in lines if line["method"] == "grpo"]
    runs = report.Runs([*lines, twins[2], twins[1]])
    mean, bounds = runs.difference("rs2", "grpo")
    assert not mean.any() and not bounds.any()


def test_a_sentence_that_is_no_longer_true_stops_the_report():
    runs = report.Runs(lines_of({"base": [[1, 1]], "grpo": [[2, 2]]}))
    assert runs.ahead("grpo", "base", 1) == "25.0"
    with pytest.raises(BadInput, match="no longer true that base is ahead of GRPO at k = 1"):
        runs.ahead("base", "grpo", 1)


@parametrize(
    "counts, expected",
    [([4, 0], "2"), ([0, 0], "1"), ([4, 4], "not up to 4"), ([3, 1], "not up to 4")],
)
def test_the_k_from_which_a_method_stays_below_the_base_is_named(counts, expected):
    runs = report.Runs(lines_of({"base": [[2, 2]], "grpo": [counts]}))  # 50, 83 and 100 %
    assert report.falls_below(runs, "grpo") == expected


def test_runs_are_chosen_by_their_settings_and_the_base_by_their_seeds():
    lines = lines_of({"base": [[0], [1], [2]], "grpo": [[0], [1]]})
    lines += lines_of({"grpo": [[3]], "rs2": [[4]]}, lr=1e-4)
    lines += [line | {"series": "rerun"} for line in lines]
    picked = report.chosen(lines, "countdown", 800, [5e-5])
    assert [(line["method"], line["correct"]) for line in picked] == [
        ("grpo", [0]),
        ("grpo", [1]),
        ("base", [0]),
        ("base", [1]),
    ]


def test_learning_rates_are_columns_and_seeds_may_be_missing():
    lines = lines_of({"base": [[0, 1]], "rs2": [[0, 2], [2, 4]], "grpo": [[4, 4]]})
    lines += lines_of({"grpo": [[1, 3]]}, lr=1e-4) + lines_of({"rs2": [[0, 0]]}, lr=2.5e-5)
    for line in lines:
        line["n"] = 32
        line["correct"] = [8 * correct for correct in line["correct"]]
    rows = report.rate_table(report.Runs(lines, by_rate=True)).splitlines()
    assert rows[0] == "|  | 2.5e-5 | 5e-5 | 1e-4 |"
    assert rows[2:] == [  # at k = 1 and 32
        "| base | 12.5/50.0 | 12.5/50.0 | 12.5/50.0 |",
        "| GRPO |  | 100.0/100.0 | 50.0/100.0 |",
        "| RS-GRPO, β = 2 | 0.0/0.0 | 50.0/75.0 |  |",
    ]


# --- One run --------------------------------------------------------------------------------------
def quick(method, **changes):
    return compare.begin("main", "quick", method, 3, changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The line and the folder of a run of GRPO."""
    folder = tmp_path_factory.mktemp("made") / "run"
    return compare.make(quick("grpo", lr=1e-3), folder), folder


def test_a_run_of_the_comparison_is_that_of_rs_grpo_with_the_same_flags(made, tmp_path):
    line, _ = made
    settings = line["settings"] | {"k": 4}
    own = variants.estimators.Config(**settings, seed=3, out=str(tmp_path / "own"))
    results = rs_grpo.train(own)
    assert results[2]["correct"] == line["correct"]  # 32 samples in the end, as on the way


def test_a_line_holds_every_setting_that_differs_from_the_defaults(made):
    line, _ = made
    asked = compare.QUICK | {"advantage": "grpo", "lr": 1e-3}
    assert asked.items() <= line["settings"].items() and line["seed"] == 3


def test_a_line_holds_the_curves_of_its_folder(made):
    line, folder = made
    metrics = [json.loads(row) for row in (folder / "metrics.jsonl").open()]
    assert line["curve"]["step"] == [0, 1, 2]
    assert line["training"]["reward"] == [round(row["reward"], 4) for row in metrics]


def test_training_curves_are_means_over_windows_named_by_their_last_step():
    metrics = [dict.fromkeys(compare.CURVES, step / 10) | {"step": step} for step in range(1, 6)]
    curves = compare.training_curves(metrics, 2)
    assert curves["step"] == [2, 4, 5] and curves["reward"] == [0.15, 0.35, 0.5]


def test_the_solve_rate_counts_each_training_problem_once():
    def collect(*arguments):
        rewards = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
        return Rollouts(["one", "two"], [], [], [], rewards, 0.0), None

    state = SimpleNamespace(step=1, results={})
    task = SimpleNamespace(train=[("one", 1), ("two", 2), ("three", 3), ("four", 4)])
    for _ in range(2):
        compare.watched(collect, every=5)(None, task, Config(), state, None)
    assert state.solve_rates == [0.25, 0.25]


def test_the_base_is_evaluated_and_not_trained(tmp_path):
    line = compare.make(quick("base"), tmp_path / "base")
    assert line["settings"]["steps"] == 0 and len(line["correct"]) == 16
    assert not {"curve", "training"} & line.keys()


def test_a_run_that_was_broken_off_goes_on_to_the_same_line(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(compare, "read_curves", lambda *arguments: 1 / 0)
        compare.make(made[0] | {"seconds": 0}, tmp_path / "run")
    monkeypatch.setitem(rs_grpo.ADVANTAGES, "grpo", lambda *arguments: 1 / 0)
    line = compare.make(quick("grpo", lr=1e-3), tmp_path / "run")  # and makes no step again
    assert line | {"seconds": 0} == made[0] | {"seconds": 0}


def test_an_unfinished_run_of_other_settings_is_refused(made):
    with pytest.raises(BadInput, match="other settings"):
        compare.make(quick("grpo", lr=2e-3), made[1])


def test_a_folder_without_a_checkpoint_is_begun_anew(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("half a li")
    assert not compare.goes_on(Config(out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_models_are_kept_if_asked_and_folders_removed_if_not(tmp_path):
    for folder in (tmp_path / "kept", tmp_path / "removed"):
        (folder / "model").mkdir(parents=True)
        (folder / "end").mkdir()
        (folder / "checkpoint.pt").touch()
        compare.clear(folder, folder.name == "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["model"]


# --- All runs -------------------------------------------------------------------------------------
def asked(flags):
    return compare.asked(compare.parse(flags.split()))


@parametrize(
    "flags",
    [
        "",
        "--lr 2.5e-5 5e-5 1e-4 2e-4",
        "--steps 2000 --only grpo rs2 rs8 --seeds 0 1 2",
        "--testbed pretrained",
        "--series rerun --only base grpo rs2 --seeds 0 1",
    ],
)
def test_nothing_is_missing_that_the_file_was_made_for(flags, capsys):
    compare.main(flags.split())
    assert "nothing is missing" in capsys.readouterr().out


def test_the_main_methods_have_five_seeds_and_the_side_questions_three():
    seeds = Counter(line["method"] for line in asked(""))
    assert seeds["rs2"] == seeds["base"] == 5 and seeds["rs2_partial"] == 3


def test_the_base_is_asked_for_once_a_seed_whatever_the_rates():
    names = Counter(line["method"] for line in asked("--lr 1e-4 2e-4 --seeds 7"))
    assert names == {"base": 1, "grpo": 2, "rs2": 2, "rs8": 2, "maxrl": 2}


@parametrize(
    "flags, said",
    [
        ("--only grpo ppo", "invalid choice: 'ppo'"),
        ("--seeds 0,1", "argument --seeds: invalid"),
        ("--testbed pretrained --series new", "give --gguf FILE to make it"),
        ("--testbed pretrained --series new --gguf no.gguf", "no.gguf can't be converted"),
    ],
)
def test_a_wrong_option_gets_one_sentence(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        compare.main(flags.split())
    assert said in f"{stopped.value} {capsys.readouterr().err}"


def comparison(folder, *flags):
    """A process that compares in that folder, 2 steps each."""
    command = [sys.executable, "-m", "evidence.compare", "--quick", "--workers", "1", *flags]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=os.environ | path, **output)


def methods_in(folder):
    lines = (folder / "runs/quick/runs.jsonl").read_text().splitlines()
    return [json.loads(line)["method"] for line in lines]


def test_a_run_that_fails_is_named_and_the_others_are_made(tmp_path):
    broken = tmp_path / "runs/quick" / compare.name_of(quick("rs2") | {"seed": 0})
    broken.mkdir(parents=True)
    (broken / "checkpoint.pt").write_text("no checkpoint")
    (broken / "config.json").write_text("{")
    process = comparison(tmp_path, "--only", "rs2", "base")
    printed, _ = process.communicate()
    assert process.returncode == 1 and f"not finished: {broken.name};" in printed
    assert methods_in(tmp_path) == ["base"]


def killed(folder, number):
    """A comparison that got this signal after its first checkpoint, once it has ended."""
    process = comparison(folder, "--only", "grpo")
    run = folder / "runs/quick" / compare.name_of(quick("grpo") | {"seed": 0})
    while process.poll() is None and not (run / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(number)
    printed, _ = process.communicate()  # returns when the run's process, too, has ended
    return process.returncode, printed


@pytest.mark.skipif(os.name != "posix", reason="signals differ")
def test_a_comparison_that_is_killed_goes_on_when_it_is_started_again(tmp_path):
    killed(tmp_path, signal.SIGKILL)
    assert comparison(tmp_path, "--only", "grpo").wait() == 0
    assert methods_in(tmp_path) == ["grpo"]


@pytest.mark.skipif(os.name != "posix", reason="signals differ")
def test_ctrl_c_ends_a_comparison_with_a_sentence(tmp_path):
    status, printed = killed(tmp_path, signal.SIGINT)
    assert status == 1 and printed.endswith("\nstopped; the same command goes on from here\n")


# --- The theory -----------------------------------------------------------------------------------


# --- Side by side ---------------------------------------------------------------------------------


# --- Speed, and what a GPU can do -----------------------------------------------------------------
