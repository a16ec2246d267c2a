"""The specification of evidence/, as sentences: `python -m pytest evidence -v` prints it."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rs_grpo
from evidence import card, compare, pretrain, report, side_by_side, speed, theory, variants
from evidence.one_problem import cell
from extensions import kl
from rs_grpo import EMBEDDED, Config, Rollouts
from test_rs_grpo import ROOT, parametrize

LINES = [json.loads(line) for line in compare.STORE.open()]
SETS = report.sets_of(LINES)
PAGE = (ROOT / "evidence/RESULTS.md").read_text()


# --- Variants -------------------------------------------------------------------------------------
@parametrize("name", variants.METHODS)
def test_every_method_has_settings_that_rs_grpo_accepts(name):
    line = compare.begin("main", "countdown", name, 0, {})
    rs_grpo.check_config(kl.Config(**line["settings"]))


CREDITS = {"12*7-9*4": 1, "9*7-12-4": 0.25, "4*12+9-7": 0.5 / 3, "4*(7+9)/12": 0.5 / (1 + 128 / 3)}
CREDITS |= dict.fromkeys("4*12 4*12+9-7-7 48 9**7-12-4 4/(12-9-7)- 9/(12-4-7-1)".split(), 0)


@parametrize("text", CREDITS)
def test_partial_credit_falls_with_the_distance_from_the_target(text):
    (credit,) = variants.partial_credits([text], [((4, 7, 9, 12), 48)])
    assert credit == pytest.approx(CREDITS[text])


def test_the_answers_to_one_problem_are_counted_and_right_ones_marked():
    answers = [(0.0, "1+1"), (1.0, "2*3"), (0.0, "1+1"), (0.0, "3-2"), (0.0, "1-1")]
    assert cell(answers) == "`1+1` (2), `2*3` ✓ (1), 2 others"


# --- The file of runs -----------------------------------------------------------------------------
def test_no_run_is_in_the_file_twice():
    assert len(set(map(compare.name_of, LINES))) == len(LINES)


def test_every_line_counts_the_correct_and_different_answers_to_each_problem():
    for line in LINES:
        problems = 512 if line["settings"].get("kl") else 256
        assert len(line["correct"]) == len(line["distinct"]) == problems
        for correct, distinct in zip(line["correct"], line["distinct"]):
            assert min(correct, 1) <= distinct <= correct <= line["n"]


# --- The report -----------------------------------------------------------------------------------
def runs_of(counts):
    """Runs with these counts of 4 samples: for each method a list of problems for each seed."""
    lines = []
    for method, seeds in counts.items():
        method, _, temperature = method.partition("~")
        settings = {"steps": 0 if method == "base" else 800, "lr": 5e-5}
        settings["temperature"] = float(temperature or 1)
        line = {"testbed": "countdown", "method": method, "n": 4}
        for seed, correct in enumerate(seeds):
            lines.append(line | {"settings": settings, "seed": seed, "correct": correct})
    return report.Runs(lines)


def test_the_page_is_what_the_report_writes_byte_for_byte_and_shows_every_figure():
    template = (ROOT / "evidence/RESULTS.template.md").read_text()
    assert PAGE == report.NOTE + report.filled(template, SETS)
    assert "{{" not in PAGE and "nan" not in PAGE
    figures = report.figures_of(SETS)
    assert re.findall(r"\]\(\.\./figures/(.*)\.png\)", PAGE) == list(figures)


def test_the_contents_of_the_page_are_its_sections():
    contents = []
    for heading in re.findall("^## (.*)", PAGE, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")  # as GitHub makes it
        contents.append(f"- [{heading}](#{anchor})")
    assert re.findall(r"^- \[.*", PAGE, re.MULTILINE) == contents


def test_a_placeholder_calls_a_method_of_the_set_that_it_names():
    runs = runs_of({"base": [[2, 2]], "grpo": [[4, 0]]})
    text = "GRPO ends {{some: points base - grpo at 4}} points below {{some: mean base at 1/4}}."
    filled = report.filled(text, {"some": runs})
    assert filled == "GRPO ends 50.0 points below 50.0/100.0."


def test_pass_at_k_is_computed_for_each_seed_and_problem():
    values = runs_of({"base": [[0, 1], [4, 2]]}).pass_at_k("base", 2)
    assert values.tolist() == [[0, 50], [100, pytest.approx(500 / 6)]]  # 3 and 5 of 6 pairs


def test_a_cell_is_the_mean_and_its_standard_error_over_seeds():
    assert report.cell(np.array([12.5, 75.0])) == "43.8 ± 31.2"  # the error: half their distance


def test_a_run_is_named_by_its_method_and_what_is_unusual():
    settings = {"steps": 2000, "lr": 1e-4, "kl": 0.02, "temperature": 1.2}
    line = {"testbed": "countdown", "method": "rs2", "settings": settings}
    assert report.name_of(line) == "rs2/2000+0.02~1.2@1e-4"
    usual = {"steps": 80, "lr": 2e-5, "temperature": 1.0}
    assert report.name_of(line | {"testbed": "pretrained", "settings": usual}) == "rs2"


def test_each_k_has_its_best_temperature():
    runs = runs_of({"grpo~0.6": [[4, 0]], "grpo": [[2, 2]], "grpo~2": [[1, 1]]})
    assert runs.family("grpo", "~") == ["grpo~0.6", "grpo", "grpo~2"]
    assert [runs.best("grpo", k).item() for k in (1, 4)] == [50, 100]


@parametrize("k", [4, 8, 16, 32])
def test_no_temperature_or_penalty_takes_grpo_to_beta_2_within_the_error(k):
    temperatures = SETS["three"].family("grpo", "~")
    penalties = SETS["three"].family("grpo", "+")
    assert len(temperatures) == 7 and len(penalties) == 4
    for name in temperatures + penalties:
        _, _, high = SETS["three"].difference(f"{name} - rs2", k)
        assert high < 0


@parametrize("k", SETS["main"].ks)
def test_a_small_penalty_takes_beta_8_above_the_base(k):
    _, low, _ = SETS["main"].difference("rs8+0.02 - base", k)
    assert low > 0


def test_no_temperature_takes_the_base_to_grpo_at_k_1():
    assert SETS["three"].best("base", 1).mean() < SETS["three"].average("grpo", 1)


def test_sums_solve_a_problem_if_some_signs_of_its_numbers_do():
    signs = list(itertools.product((1, -1), repeat=4))
    questions = (EMBEDDED / "held-out.txt").read_text().splitlines()
    for question, found in zip(questions, report.solved_by_sums()):
        *numbers, target = map(int, question[:-1].replace("=", ",").split(","))
        assert found == (target in np.dot(signs, numbers))


def test_only_a_part_of_the_problems_counts():
    whole = runs_of({"grpo": [[4, 0, 4]]})
    part = report.Runs(list(whole.lines["grpo"].values()), part=slice(1, 3))
    assert part.mean("grpo", "1/4") == "50.0/50.0"


@parametrize("name", ["base", "grpo", "rs2", "rs8"])
def test_the_means_of_five_seeds_in_the_readme_are_those_of_the_report(name):
    cells = [report.cell(SETS["main"].per_seed(name, k)) for k in (1, 32, 256)]
    assert f"| {report.LABELS[name]} | {' | '.join(cells)} |" in (ROOT / "README.md").read_text()
    means = SETS["main"].mean(name, "1/32/256").split("/")
    assert name == "rs8" or " ".join(means) in " ".join(rs_grpo.__doc__.split())


def test_the_first_table_differs_from_the_one_made_before_as_the_page_says():
    points, errors = {}, {}  # how much lower the mean is now, also in standard errors
    for name in report.MAIN:
        for k in (1, 4, 32, 256, 512):
            now, before = (SETS[which].per_seed(name, k) for which in ("main", "before"))
            error = np.hypot(report.standard_error(now), report.standard_error(before))
            points[name, k] = before.mean() - now.mean()
            errors[name, k] = points[name, k] / error
    largest = []
    for values in (points, errors):
        largest += [values.pop(("rs2", k)) for k in (32, 256, 512)]
    words = "it is now {:.1f}, {:.1f} and {:.1f} points lower, which is {:.1f}, {:.1f} and {:.1f} "
    assert words.format(*largest) in " ".join(PAGE.split())
    assert len(errors) == 52 and max(map(abs, errors.values())) <= 2.0


RNG = random.Random(0)
THEIRS = [[RNG.randint(0, 2) for _ in range(256)] for _ in range(3)]


def difference(ours):
    """Mean, low and high of pass@1, in points."""
    return runs_of({"grpo": THEIRS, "rs2": ours}).difference("rs2 - grpo", 1)


def test_the_interval_of_a_difference_resamples_problems():
    gain = [RNG.randint(0, 2) for _ in range(256)]  # the same in every seed
    ours = [np.add(seed, gain).tolist() for seed in THEIRS]
    mean, low, high = difference(ours)
    points = 25 * np.array(gain)
    spread = 1.96 * points.std() / 256**0.5
    assert mean == pytest.approx(points.mean())
    assert (mean - low, high - mean) == pytest.approx((spread, spread), abs=0.15)


def test_the_interval_of_a_difference_resamples_seeds():
    """Seeds gain 0, 25 and 50 points: one in 27 draws takes the same extreme seed thrice."""
    ours = [np.add(counts, seed).tolist() for seed, counts in enumerate(THEIRS)]
    assert difference(ours) == pytest.approx((25, 0, 50))


def test_differences_are_of_equal_seeds_in_whatever_order_they_stand():
    lines = [*runs_of({"grpo": THEIRS}).lines["grpo"].values()]
    twins = [line | {"method": "rs2"} for line in (lines[2], lines[1])]
    runs = report.Runs([*twins, *lines])
    assert runs.difference("rs2 - grpo", 1) == (0, 0, 0)


COUNTS = {"2": [4, 0], "1": [0, 0], "not up to 4": [3, 1]}


@parametrize("k", COUNTS)
def test_the_k_from_which_a_method_stays_below_the_base_is_named(k):
    runs = runs_of({"base": [[2, 2]], "grpo": [COUNTS[k]]})  # the base: 50, 83 and 100 %
    assert runs.falls_below("grpo") == k


def test_a_method_is_below_the_base_of_its_own_seeds_only():
    runs = runs_of({"base": [[1, 0], [4, 4]], "grpo": [[1, 0]]})
    assert runs.falls_below("grpo") == "not up to 4"


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
    own = kl.Config(**line["settings"], seed=3, out=str(tmp_path / "own"))
    assert rs_grpo.train(own)[2]["correct"] == line["correct"]


def test_curves_are_means_in_training_and_hold_both_ends_of_held_out_evaluations(made):
    line, folder = made
    rewards = [json.loads(row)["reward"] for row in (folder / "metrics.jsonl").open()]
    assert line["training"]["step"] == [2]
    assert line["training"]["reward"] == [round(np.mean(rewards), 4)]
    accuracy = 100 * np.mean(line["correct"]) / line["n"]
    assert line["curve"]["step"] == [0, 1, 2]
    assert line["curve"]["pass@1"][-1] == round(accuracy, 3)


def test_the_solve_rate_counts_each_training_problem_once():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    rollouts = Rollouts(["one", "two"], [], [], [], rewards, 0.0)
    collect = compare.watched(lambda *arguments: (rollouts, None), compare.TESTBEDS["quick"])
    state = SimpleNamespace(results={0: None, 1: None})
    task = SimpleNamespace(train=["one", "two", "three", "four"])
    for state.step in (0, 1):
        collect(None, task, Config(), state, None)
    assert state.solve_rates == [0.25, 0.25]


def test_the_base_is_evaluated_and_not_trained(tmp_path):
    line = compare.make(quick("base"), tmp_path / "base")
    assert line["settings"]["steps"] == 0 and len(line["correct"]) == 16
    assert not {"curve", "training"} & line.keys()


def test_a_run_that_was_broken_off_goes_on_to_the_same_line(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(compare, "curves", lambda *arguments: 1 / 0)
        compare.make(quick("grpo", lr=1e-3), tmp_path / "run")
    monkeypatch.setitem(rs_grpo.ADVANTAGES, "grpo", lambda *arguments: 1 / 0)
    again = compare.make(quick("grpo", lr=1e-3), tmp_path / "run")  # and makes no step again
    assert again | {"seconds": 0} == made[0] | {"seconds": 0}


def test_an_unfinished_run_of_other_settings_is_begun_anew(tmp_path):
    (tmp_path / "checkpoint.pt").touch()
    (tmp_path / "config.json").write_text("{}")
    goes_on = compare.goes_on(Config(out=str(tmp_path)))
    assert not goes_on and not tmp_path.exists()


# --- All runs -------------------------------------------------------------------------------------
MADE_FOR = """
--lr 2.5e-5 5e-5 1e-4 2e-4
--steps 2000 --only grpo rs2 rs8 --seeds 0 1 2
--testbed pretrained
--only base grpo rs2 rs4 rs8 --temperature 0.6 0.8 1.2 1.4 1.6 2
--only grpo --kl 0.02 0.1 0.2
--only rs2 --kl 0.01 0.02 0.05
--only rs8 --kl 0.01 0.02
""".splitlines()  # the first is empty: no flags


@parametrize("flags", MADE_FOR)
def test_nothing_is_missing_that_the_file_was_made_for(flags):
    assert compare.missing(compare.parse(flags.split())) == []


def test_the_base_is_asked_for_once_a_seed_whatever_the_rates():
    args = compare.parse(["--lr", "1e-4", "2e-4", "--seeds", "7"])
    names = Counter(line["method"] for line in compare.asked(args))
    assert names == {"base": 1, "grpo": 2, "rs2": 2, "rs8": 2, "maxrl": 2}


@parametrize("method", ["grpo", "rs2", "rs8"])
def test_the_weight_of_a_penalty_that_other_problems_chose_has_five_seeds(method):
    scores = {}  # means of pass@k over five k
    for name in SETS["chosen"].family(method, "+")[1:]:  # the first has no penalty
        scores[name] = np.mean([SETS["chosen"].average(name, k) for k in (1, 4, 32, 256, 512)])
    best = max(scores, key=scores.get)
    assert [name for name in scores if len(SETS["main"].lines[name]) == 5] == [best]


def test_a_penalty_is_part_of_a_run_and_evaluated_on_more_problems():
    args = compare.parse("--only rs2 rs8 --kl 0.01 0.05 --seeds 1".split())
    lines = compare.asked(args)
    found = [(line["method"], line["settings"]["kl"]) for line in lines]
    assert found == [("rs2", 0.01), ("rs2", 0.05), ("rs8", 0.01), ("rs8", 0.05)]
    assert {line["settings"]["eval_problems"] for line in lines} == {512}
    assert compare.name_of(lines[1]) == "main-countdown-rs2-800steps-5e-05-kl0.05-seed1"


def test_at_other_temperatures_kept_models_are_evaluated_and_not_trained():
    args = compare.parse("--only base grpo --temperature 0.6 2 --seeds 4".split())
    lines = compare.asked(args)
    models = [line["settings"]["model"] for line in lines]
    kept = "runs/main-countdown-grpo-800steps-5e-05-seed4/model"
    assert models == ["countdown-base"] * 2 + [kept] * 2
    assert {line["settings"]["steps"] for line in lines} == {0}
    assert compare.name_of(lines[3]) == "main-countdown-grpo-0steps-5e-05-temperature2-seed4"


@parametrize("flags", ["--temperature 0.6 1", "--temperature 2 --steps 2000"])
def test_evaluations_that_would_take_the_name_of_others_are_refused(flags, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        compare.parse(flags.split())
    assert "--temperature takes others than 1" in capsys.readouterr().err


WRONG = {
    "--only grpo ppo": "invalid choice: 'ppo'",
    "--testbed pretrained --series new": "give --gguf FILE to make it",
    "--testbed pretrained --series new --gguf no.gguf": "no.gguf can't be converted",
}


@parametrize("flags", WRONG)
def test_a_wrong_option_gets_one_sentence(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        compare.main(flags.split())
    assert WRONG[flags] in f"{stopped.value} {capsys.readouterr().err}"


def comparison(folder, *flags):
    """A process that compares in that folder, 2 steps each."""
    command = [sys.executable, "-m", "evidence.compare", "--quick", "--workers", "1", *flags]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, **output)


def methods_in(folder):
    lines = (folder / "runs/quick/runs.jsonl").read_text().splitlines()
    return [json.loads(line)["method"] for line in lines]


def test_a_run_that_fails_is_named_and_the_others_are_made(tmp_path):
    broken = tmp_path / "runs/quick/main-quick-rs2-2steps-5e-05-seed0"
    (broken / "checkpoint.pt").mkdir(parents=True)
    process = comparison(tmp_path, "--only", "rs2", "base")
    printed, _ = process.communicate()
    assert process.returncode == 1 and f"not finished: {broken.name};" in printed
    assert methods_in(tmp_path) == ["base"]


def killed(folder, number):
    """A comparison that got this signal after its first checkpoint, once it has ended."""
    process = comparison(folder, "--only", "grpo")
    while process.poll() is None and not list(folder.glob("runs/quick/*/checkpoint.pt")):
        time.sleep(0.01)
    process.send_signal(number)
    printed, _ = process.communicate()
    return process.returncode, printed


@pytest.mark.skipif(os.name != "posix", reason="signals differ")
def test_a_comparison_that_is_killed_goes_on_when_it_is_started_again(tmp_path):
    killed(tmp_path, signal.SIGKILL)
    again = comparison(tmp_path, "--only", "grpo", "--keep-models")
    assert again.wait() == 0 and methods_in(tmp_path) == ["grpo"]
    assert list(tmp_path.glob("runs/quick/*/model"))  # kept, as asked for


@pytest.mark.skipif(os.name != "posix", reason="signals differ")
def test_ctrl_c_ends_a_comparison_with_a_sentence(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    status, printed = killed(tmp_path, signal.SIGINT)
    assert status == 1 and printed.endswith("\nstopped; the same command goes on from here\n")


# --- The lemmas and Figure 2 ----------------------------------------------------------------------
def change_by_autograd(probs, rewards, beta):
    """δπ(a*)/α of a step along the gradient of (1/β) log E[exp(βr)], for one policy: (K,), (K,)."""
    theta = probs.log().requires_grad_()
    policy = theta.softmax(0)
    objective = policy @ rewards
    if beta:
        objective = (policy @ torch.exp(beta * rewards)).log() / beta
    (step,) = torch.autograd.grad(objective, theta, retain_graph=True)
    (slope,) = torch.autograd.grad(policy[rewards.argmax()], theta)
    return (slope @ step).item()


@parametrize("beta", [-4, 0, 4, 16])
def test_the_change_of_one_update_is_the_one_that_autograd_finds(beta):
    bandits = theory.random_bandits(5)
    computed = theory.one_step_change(bandits, beta)
    for arms, rewards, change in zip(*bandits, computed):
        probs = arms.bincount() / arms.double().numel()
        exact = change_by_autograd(probs.double(), rewards, beta)
        assert change.item() == pytest.approx(exact, rel=1e-5)


@pytest.fixture(scope="module")
def policies():
    """The probabilities (P, K) of 1,000 random policies, and the bandits themselves."""
    bandits = theory.random_bandits(1_000)
    return torch.nn.functional.one_hot(bandits.arms).double().mean(1), bandits


def test_lemma_2_the_standard_gradient_can_lower_the_best_arm(policies):
    lowered = theory.one_step_change(policies[1], 0) < 0
    assert 50 < lowered.sum() < 500


@parametrize("beta", [1e4, 1e5, 1e6])
def test_lemma_3_a_large_beta_raises_the_best_arm_of_every_policy(policies, beta):
    assert (theory.one_step_change(policies[1], beta) > 0).all()


def test_lemma_4_in_the_limit_the_rise_shrinks_as_1_over_beta(policies):
    probs, bandits = policies
    best = torch.nn.functional.one_hot(bandits.rewards.argmax(1), 10)
    p = (probs * best).sum(1)
    others = (probs * (1 - best)).square().sum(1)
    change = theory.one_step_change(bandits, 1e6)
    torch.testing.assert_close(1e6 * change, p * ((1 - p) ** 2 + others))


# Of Figure 2: for each β the accuracy 1/(1+e^(β/2)) with the largest mean |Â|, and |Â| at 15/16.
PRINTED = ["0 -4.8e-04 0.0000", "16 9.0e-04 0.0145", "for 1,000 of the 1,000"]
PRINTED += ["pass@4 0.250 0.000", "β = 0 0.500 0.117", "β = 2 0.269 0.054"]


def test_the_theory_prints_its_tables_and_draws_its_pictures(tmp_path, capsys):
    theory.main(["--out", str(tmp_path / "new")])
    printed = " ".join(capsys.readouterr().out.split())
    assert [words for words in PRINTED if words not in printed] == []
    for picture in ("lemmas.png", "advantages.png"):
        assert (tmp_path / "new" / picture).read_bytes().startswith(b"\x89PNG")


# --- Problems, and a training step timed ----------------------------------------------------------
@parametrize("name, size, _, held_out", pretrain.PROBLEMS)
def test_the_problems_beside_the_model_are_those_that_pretraining_writes(name, size, _, held_out):
    some = pretrain.problems(size, 20, held_out)
    assert (EMBEDDED / name).read_text().splitlines()[:20] == some


def test_what_pretraining_learns_from_is_correct_and_never_held_out():
    for seed in range(300):
        prompt, text = pretrain.example(random.Random(seed))
        *numbers, target = map(int, prompt[:-1].replace("=", ",").split(","))
        assert rs_grpo.countdown_value(text, numbers) == target
        assert not pretrain.is_held_out(prompt)


def test_only_completions_are_learned_in_pretraining():
    _, tokenizer = pretrain.make_policy()
    ids, labels = pretrain.batch(random.Random(0), tokenizer)
    for row, label in zip(ids, labels):
        prompt, text = tokenizer.decode(row, skip_special_tokens=True).split(":")
        assert tokenizer.decode(label[label >= 0]) == f"{text}<eos>"


def test_each_step_is_timed_but_the_first_and_sampling_is_a_part_of_it():
    times = speed.time_ours("rs", 2, {"prompts": 2, "samples": 2, "device": "cpu"})
    assert len(times) == 2 and all(0 < sampling < seconds for seconds, sampling in times)


def test_a_group_without_a_signal_is_computed_but_not_learned_from():
    rewards = torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    silent, mixed = speed.every_group(rewards, Config())
    assert (silent != 0).all() and silent.abs().max() < 1e-20
    assert torch.equal(mixed, rs_grpo.risk_sensitive_advantage(rewards, 2.0)[1])


# --- Runs side by side ----------------------------------------------------------------------------
def write_run(folder, before=(10.0, 20.0), after=(30.0, 40.0), distinct=1, **changes):
    """A finished run of two steps, evaluated on two problems with two samples."""
    config = {"advantage": "rs", "beta": 2.0, "seed": 0, "steps": 2, "model": "tiny"}
    config |= {"task": "sums", "eval_problems": 2, "eval_samples": 2, "temperature": 1.0}
    config |= {"max_tokens": 0, "out": str(folder), **changes}
    base = {"pass_at_k": dict(zip("12", before)), "distinct": [0, 1]}
    trained = {"pass_at_k": dict(zip("12", after)), "distinct": [0, distinct]}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "eval.json").write_text(json.dumps({"0": base, "2": trained}))
    (folder / "metrics.jsonl").write_text('{"reward": 0.5, "entropy": 1}\n' * config["steps"])
    return folder


def show(capsys, *folders):
    side_by_side.main([*map(str, folders), "--out", str(folders[0].parent / "picture.png")])
    return capsys.readouterr()


def test_the_table_has_a_column_for_the_base_and_for_each_run(tmp_path, capsys):
    one = write_run(tmp_path / "one", advantage="grpo")
    two = write_run(tmp_path / "two", after=(25.0, 66.6667), distinct=4)
    lines = show(capsys, one, two).out.splitlines()
    assert lines[:4] == [
        "              base    grpo    rs-2",
        "pass@1        10.0    30.0    25.0",
        "pass@2        20.0    40.0    66.7",
        "distinct      0.50    0.50    2.00",
    ]


def test_the_base_is_the_mean_over_seeds_and_each_seed_counts_once(tmp_path, capsys):
    write_run(tmp_path / "a", before=(10.0, 20.0))
    write_run(tmp_path / "b", before=(10.0, 20.0), advantage="grpo")
    write_run(tmp_path / "c", before=(16.0, 30.0), seed=3)
    lines = show(capsys, *sorted(tmp_path.iterdir())).out.splitlines()
    assert [line.split()[1] for line in lines[1:3]] == ["13.0", "25.0"]


NAMES = [
    ({"seed": 1}, "rs-2 seed 0, rs-2 seed 1"),
    ({"advantage": "grpo", "lr": 1e-5}, "rs-2, grpo lr 1e-05"),
    ({"beta": 0.5}, "rs-2, rs-0.5"),
    ({}, "rs-2, rs-2 other"),
]


@parametrize("changes, names", NAMES)
def test_runs_are_named_by_what_differs(tmp_path, monkeypatch, changes, names):
    monkeypatch.chdir(tmp_path)
    folders = [write_run(Path("one")), write_run(Path("other"), **changes)]
    columns = side_by_side.columns_of([side_by_side.read_run(folder) for folder in folders])
    assert ", ".join(columns) == f"base, {names}"


@parametrize("name", side_by_side.EVALUATION)
def test_runs_that_were_evaluated_differently_are_refused(tmp_path, capsys, name):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", **{name: 7})
    with pytest.raises(SystemExit, match="2"):
        show(capsys, one, other)
    said = capsys.readouterr().err
    assert f"{name} is " in said and f"in {one} and 7 in {other}" in said and said.count("\n") == 1


DAMAGES = [
    ("config.json", None, "isn't the folder of a run (FileNotFoundError"),
    ("config.json", "[]", "isn't the folder of a run (TypeError"),
    ("eval.json", '{"0": {', "isn't the folder of a run (JSONDecodeError"),
    ("eval.json", '{"0": {}}', "isn't finished; go on with --resume --out"),
]


@parametrize("name, content, said", DAMAGES)
def test_a_folder_without_a_finished_run_is_left_out(tmp_path, capsys, name, content, said):
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad")
    (bad / name).unlink() if content is None else (bad / name).write_text(content)
    printed = show(capsys, good, bad)
    assert printed.err.startswith("left out:") and said in printed.err
    assert printed.err.count("\n") == 1 and "pass@1        10.0    30.0" in printed.out
    with pytest.raises(SystemExit, match="2"):
        show(capsys, bad)
    assert "none of these is a finished run" in capsys.readouterr().err


def test_all_of_runs_is_shown_and_the_picture_does_not_disturb(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/a"), steps=0, after=(10.0, 20.0))
    write_run(Path("runs/b"), advantage="grpo")
    for _ in range(2):
        side_by_side.main([])
        printed = capsys.readouterr()
        assert printed.out.split()[:3] == ["base", "rs-2", "steps"] and not printed.err
    assert Path("runs/side-by-side.png").read_bytes().startswith(b"\x89PNG")


# --- The card -------------------------------------------------------------------------------------
def fails(plan):
    yield "Before it failed.", "unit", [[1]]
    raise ValueError("on purpose")


def hangs(plan):
    child = subprocess.Popen(["sleep", "600"])
    yield "Before it hung.", "its child's process", [[child.pid]]
    time.sleep(600)


def works(plan):
    yield "A figure.", "speed (tokens/s) | status", [[1234.5, None], [0.012345, "a|b"]]
    yield "A text.", "as it is"


def test_a_step_of_the_card_that_fails_or_hangs_is_noted_and_all_figures_are_kept(tmp_path):
    plan = card.Plan(tmp_path, device="cpu", model={}, quick=True)
    card.run_all({"3": ("Works", 1, works)}, plan, minutes=1)
    steps = {"1": ("Fails", 30, fails), "2": ("Hangs", 2, hangs), "4": ("Works", 30, works)}
    card.run_all(steps, plan, minutes=3)
    figures = json.loads((tmp_path / "card.json").read_text())
    assert figures["1"]["note"].endswith("ValueError: on purpose")
    assert figures["1"]["tables"] == {"Before it failed.": ["unit", [[1]]]}
    assert figures["2"]["note"].startswith("stopped after")
    assert figures["3"]["note"].startswith("finished in")
    ((child,),) = figures["2"]["tables"]["Before it hung."][1]
    time.sleep(0.5)
    stopped = not os.path.exists(f"/proc/{child}") or " Z " in open(f"/proc/{child}/stat").read()
    assert stopped  # the step's process group was killed, not the step alone
    page = (tmp_path / "card.md").read_text()
    assert page.index("## 1. Fails\n") < page.index("## 3. Works\n")
    assert "| speed (tokens/s) | status |\n| --- | --- |\n| 1,234 | – |\n| 0.0123 | a/b |" in page
    assert "```\nas it is\n```" in page


def test_a_gguf_file_in_parts_is_joined_and_converted(tmp_path, monkeypatch):
    parts = [str(tmp_path / f"smol.gguf.part{i}") for i in (1, 2)]
    for part in parts:
        Path(part).write_text(part[-1])
    joined = []
    monkeypatch.setattr(card, "convert", lambda gguf, out: joined.append(gguf.read_text()))
    assert card.folder_of(parts, tmp_path) == str(tmp_path / "model") and joined == ["12"]
    assert card.folder_of(["runs/model"], tmp_path) == "runs/model"
