"""The round-cost model: invented histories with numbers worked by hand, units, and the command."""

import json

import numpy as np
import pandas
import pytest

from fedbilevel.compare import Plan, Shipped
from fedbilevel.cost.model import advice, clients_an_exchange, predict
from fedbilevel.cost.network import NETWORKS, RATES, TIMES, Network, amount, duration
from fedbilevel.errors import InputError
from fedbilevel.results import report
from fedbilevel.results.folder import clear
from fedbilevel.tasks import Options

CLIENTS = 4
LATE = Network(latency=0.5, up=4e6, down=8e6)  # rounds are what costs
THIN = Network(latency=0.01, up=40e3, down=80e3)  # bytes are what costs


def run(algorithm, seed, values, rounds, megabytes_down, megabytes_up, metric="test_accuracy"):
    """A history with the same cost in every iteration; 0.4 seconds each."""
    k = np.arange(len(values))
    return pandas.DataFrame({
        "algorithm": algorithm, "seed": seed, "iteration": k, "rounds": rounds * k,
        "bytes_down": megabytes_down * 10**6 * k, "bytes_up": megabytes_up * 10**6 * k, "seconds": 0.4 * k, metric: values,
    })  # fmt: skip


EARLY = [0.1, *[0.91] * 9]  # the median of five evaluations is at 90 % at iteration 4
LATER = [0.1, 0.1, 0.1, *[0.91] * 7]  # at iteration 5
FEW = [run("few", seed, values, 2, 4, 2) for seed, values in enumerate((EARLY, LATER))]
LIGHT = [run("light", seed, values, 10, 0.4, 0.2) for seed, values in enumerate((EARLY, LATER))]
HISTORY = pandas.concat([*FEW, *LIGHT])


def test_numbers_worked_by_hand():
    # An iteration of "few": 2 rounds of 0.5 s; 4 MB / 4 clients = 8 Mbit at 8 Mbit/s; 2 MB / 4 = 4 Mbit at 4 Mbit/s;
    # 0.4 s / 4: 3.1 s. Seeds are there after 4 and 5 iterations: the mean of the two is 4.5 iterations.
    # An iteration of "light": 5 s, 0.1 s, 0.1 s and 0.1 s: 5.3 s.
    table = predict(HISTORY, {"late": LATE}, CLIENTS).table.set_index("algorithm")
    few = table.loc["few"]
    assert few["seconds"] == pytest.approx(4.5 * 3.1)
    assert few[["seconds_latency", "seconds_transfer", "seconds_computation"]].tolist() == pytest.approx([4.5, 9, 0.45])
    assert few[["rounds", "megabytes_down", "megabytes_up"]].tolist() == pytest.approx([9, 4.5, 2.25])
    assert table.loc["light", "seconds"] == pytest.approx(4.5 * 5.3)
    assert few["seconds_to_80%"] == few["seconds_to_90%"] == few["seconds"]
    assert np.isinf(few["seconds_to_93%"])


def test_the_network_decides_which_algorithm_to_use():
    # THIN: "few" takes 4.5 * (0.02 + 100 + 100 + 0.1) s, "light" 4.5 * (0.1 + 10 + 10 + 0.1) s
    prediction = predict(HISTORY, {"late": LATE, "thin": THIN}, CLIENTS)
    assert advice(prediction).splitlines() == [
        "On late use few: 90 % in 14 s, 1.7 times sooner than light.",
        "On thin use light: 90 % in 91 s, 9.9 times sooner than few.",
    ]


def test_compute_is_a_factor_and_0_leaves_computation_out():
    seconds = lambda compute: predict(HISTORY, {"late": LATE}, CLIENTS, compute=compute).table["seconds"][0]
    assert seconds(10) == pytest.approx(4.5 * 4)
    assert seconds(0) == pytest.approx(4.5 * 3)


def test_the_payload_of_the_whole_cohort_passes_the_server():
    # its link down to the clients carries 4 MB an iteration, 16 s at 2 Mbit/s; a link as fast as 4 clients changes nothing
    transfer = lambda **server: (
        predict(HISTORY, {"": Network(0.5, 4e6, 8e6, **server)}, CLIENTS).table["seconds_transfer"][0] / 4.5
    )
    assert transfer(server_up=2e6) == pytest.approx(16 + 1)
    assert transfer(server_down=2e6) == pytest.approx(1 + 8)
    assert transfer(server_up=32e6, server_down=16e6) == pytest.approx(2)
    assert transfer(server_up=31e6) > 2.01


def test_a_level_nobody_reaches():
    prediction = predict(HISTORY, {"late": LATE}, CLIENTS, level=0.95)
    assert np.isinf(prediction.table["seconds"]).all()
    sentence = "On late no algorithm reaches 95 %; the highest level of the table that is reached is 90 %."
    assert advice(prediction) == sentence
    one = predict(pandas.concat(FEW), {"late": LATE}, CLIENTS)
    assert advice(one) == "On late few takes 14 s to 90 %."


@pytest.mark.parametrize(
    ("finishing", "text"),
    [(1, "On late use few: 90 % in 12 s; no other algorithm gets there."), (2, "1.7 times sooner than other.")],
)
def test_more_than_half_of_the_seeds_must_get_there(finishing, text):
    others = [run("other", s, EARLY if s < finishing else [0.1] * 10, 10, 0.4, 0.2) for s in range(3)]
    assert text in advice(predict(pandas.concat([FEW[0], *others]), {"late": LATE}, CLIENTS))


def test_a_metric_that_falls_is_measured_at_the_loosest_end():
    # medians of the last five: steep 1 and 2 (the looser one counts), flat 3, which steep passes at iteration 3
    # (window 0..4: 10 4 3 2 2), and flat at its end; "up" ends worse than it started and does not count
    falls = lambda name, seed, values: run(name, seed, values, 1, 0, 0, "test_error")
    steep = [falls("steep", 0, [10, 4, 3, 2, 1, 1, 1, 1]), falls("steep", 1, [10, 4, 3, 2, 2, 2, 2, 2])]
    flat = [falls("flat", 0, [10, 9, 8, 7, 6, 3, 3, 3])]
    prediction = predict(pandas.concat([*steep, *flat, falls("up", 0, [2, *[5] * 7])]), {"late": LATE}, CLIENTS)
    assert (prediction.goal.metric, prediction.goal.level) == ("test_error", 3)
    assert prediction.table["rounds"].tolist()[:2] == [4, 7]
    assert np.isinf(prediction.table["seconds"][2])
    assert "use steep: test error 3 in" in advice(prediction)
    with pytest.raises(InputError, match="no algorithm ends with a better test error"):
        predict(falls("up", 0, [2, *[5] * 7]), {"late": LATE}, CLIENTS)


@pytest.mark.parametrize(
    ("text", "seconds"), [("200ms", 0.2), ("0.2s", 0.2), ("2 s", 2), (".5s", 0.5), ("1min", 60), ("0s", 0)]
)
def test_times(text, seconds):
    assert amount("--latency", text, TIMES) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("500kbit", 5e5), ("5Mbit", 5e6), ("5 Mbit/s", 5e6), ("1Gbit", 1e9),
        ("3kB", 24e3), ("20MB/s", 160e6), ("1.5GB/s", 12e9),
    ],
)  # fmt: skip
def test_rates(text, bits):
    assert amount("--up", text, RATES) == pytest.approx(bits)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.25, "250 ms"), (2.14, "2.1 s"), (99.7, "100 s"), (720, "12 min"), (9000, "2.5 h"), (2e5, "2.3 days"),
     (np.inf, "never")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def folder(tmp_path):
    """A results folder of the invented history."""
    HISTORY.to_csv(tmp_path / "history.csv", index=False)
    (tmp_path / "config.json").write_text(json.dumps({"clients_an_exchange": CLIENTS, "cohort": None}))
    return tmp_path


def test_the_command_prints_a_table_and_leaves_files(fedbilevel, folder):
    code, text, _ = fedbilevel("cost", folder, "--latency", "500ms", "--up", "4Mbit", "--down", "1MB/s")
    assert code == 0
    assert text.strip().splitlines()[-1] == "On this network use few: 90 % in 14 s, 1.7 times sooner than light."
    assert "32 / 65 / 3" in text and "never" in text
    markdown = (folder / "cost.md").read_text()
    assert "| few | 9 | 6.75 | 32 / 65 / 3 | **14 s** | **14 s** | **14 s** | **14 s** | never |" in markdown
    assert pandas.read_csv(folder / "cost.csv")["seconds"].tolist() == pytest.approx([13.95, 23.85])
    assert (folder / "cost.png").stat().st_size > 0


def test_the_command_as_json_on_all_networks(fedbilevel, folder):
    code, text, _ = fedbilevel("cost", folder, "--network", "all", "--level", "0.95", "--json")
    assert code == 0
    records = json.loads(text)
    assert [(row["network"], row["algorithm"]) for row in records] == [
        (n, a) for n in NETWORKS for a in ("few", "light")
    ]
    assert all(row["seconds"] is None and row["seconds_to_90%"] > 0 for row in records)
    code, text, _ = fedbilevel("cost", folder, "--network", "all")
    marked = [line.split()[0] for line in text.splitlines() if "*" in line and "soonest" not in line]
    assert (code, marked) == (0, list(NETWORKS))


NUMBERS = "--latency 1s --up 1MB --down 1MB"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "--latency and --up and --down missing"),
        ("--latency 1s --up 1MB", "--down missing"),
        (
            "--latency 200 --up 1MB --down 1MB",
            "a time with its unit (ms, s, min), as in 200ms, 0.2s or 1min; got '200'",
        ),
        ("--latency 2h --up 1MB --down 1MB", "got '2h'"),
        ("--latency -1s --up 1MB --down 1MB", "got '-1s'"),
        ("--latency 1s --up 5mbit --down 1MB", "--up takes a rate with its unit (kbit, Mbit, Gbit, kB, MB, GB)"),
        ("--latency 1s --up 1MB --down fast", "--down takes a rate"),
        ("--latency 1s --up 0MB --down 1MB", "up= is a link's bits a second, above 0; got 0.0"),
        (f"{NUMBERS} --server-up 1Mb/s", "--server-up takes a rate"),
        (f"{NUMBERS} --server-down 1", "--server-down takes a rate"),
        (f"{NUMBERS} --network hospitals", "not both"),
        ("--network hospital", "did you mean 'hospitals'"),
        (f"{NUMBERS} --level 90", "above 0 and up to 1, as in 0.9; got 90"),
        (f"{NUMBERS} --level high", "--level"),
        (f"{NUMBERS} --compute -1", "--compute is a factor on the seconds of computation, 0 or more; got -1.0"),
        (f"{NUMBERS} --compute nan", "got nan"),
        (f"{NUMBERS} --cohort 0", "at least 1; got 0"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(fedbilevel, folder, words, says):
    code, text, error = fedbilevel("cost", folder, *words.split())
    assert code == 2
    assert says in error
    assert text == ""
    assert len(error.strip().splitlines()) == 1
    assert not (folder / "cost.md").exists()


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", "{}", "say it with --cohort"),
        ("config.json", "[1]", "cannot be read: say with --cohort"),
        ("config.json", "no json", "cannot be read: say with --cohort"),
        ("history.csv", ",".join(report.FIXED), "has no rows"),
        ("history.csv", ",".join(report.FIXED) + "\na,0,0,0,0,0,long", "no numbers in seconds"),
        ("history.csv", ",".join(report.FIXED) + "\na,0,0,0,0,0,0", "has no metric"),
    ],
)
def test_a_folder_that_does_not_tell(fedbilevel, folder, file, content, says):
    (folder / file).write_text(content)
    code, _, error = fedbilevel("cost", folder, *NUMBERS.split())
    assert (code, len(error.strip().splitlines())) == (2, 1)
    assert says in error


def test_clients_an_exchange_of_older_folders(folder):
    said = lambda config: (folder / "config.json").write_text(json.dumps(config)) and clients_an_exchange(folder)
    assert said({"cohort": 3, "options": {"clients": 8}}) == 3
    assert said({"cohort": None, "options": {"clients": 8}}) == 8
    assert clients_an_exchange(folder, 5) == 5


def test_a_run_records_how_many_clients_an_exchange_asks(tmp_path):
    def said(cohort, clients, resume=False, overwrite=False):
        plan = Plan(Shipped("quadratic", Options()), {"aggitd": {}}, (0,), rounds=100, cohort=cohort)
        return clients_an_exchange(plan.open(tmp_path / "out", clients, resume, overwrite))

    assert said(None, 5) == 5
    assert said(3, 5, overwrite=True) == 3
    with pytest.raises(InputError, match="cohort was 3 and is None"):
        said(None, 5, resume=True)
    file = tmp_path / "out" / "config.json"
    older = {k: v for k, v in json.loads(file.read_text()).items() if k != "clients_an_exchange"}
    file.write_text(json.dumps(older))  # as written before it was recorded
    assert said(3, 5, resume=True) == 3
    assert "clients_an_exchange" in json.loads(file.read_text())


def test_an_overwritten_folder_keeps_no_prediction(fedbilevel, folder):
    assert fedbilevel("cost", folder, "--network", "hospitals")[0] == 0
    clear(folder)
    assert not any(folder.iterdir())
