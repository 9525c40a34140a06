"""What it would cost: the numbers of `fedbilevel cost --network all`."""

from fedbilevel.cost.model import predict
from fedbilevel.cost.network import NETWORKS, duration
from fedbilevel.page import found
from fedbilevel.page.networks import networks
from helpers import folders


def test_a_row_per_algorithm_and_a_column_per_network(tmp_path):
    seen = found.look(folders.compared(tmp_path / "out"))
    read = folders.Page(networks(seen))
    table = predict(seen.frame, NETWORKS, 8).table
    for name in ("lockstep", "fednest"):
        times = " ".join(duration(value) for value in table[table["algorithm"] == name]["seconds"])
        assert f"{name} {times}" in read.text
    assert "the fastest in bold" in read.text and "b" in read.elements


def test_where_nobody_gets_to_the_usual_level_a_lower_one_is_taken(tmp_path):
    metrics = {"test_accuracy": lambda k: min(0.86, 0.1 + 0.1 * k)}
    read = folders.Page(networks(found.look(folders.compared(tmp_path / "out", metrics=metrics))))
    assert "Predicted time to 85 % test accuracy" in read.text and "never" not in read.text
    low = {"test_accuracy": lambda k: 0.1}
    read = folders.Page(networks(found.look(folders.compared(tmp_path / "low", metrics=low))))
    assert "to 90 % test accuracy" in read.text and read.text.count("never") == 8


def test_where_nothing_can_be_predicted_it_is_said_why(tmp_path):
    cases = {"none": {"metrics": {}}, "who": {"clients_an_exchange": None}, "rise": {"metrics": {"e": lambda k: k}}}
    for name, more in cases.items():
        read = folders.Page(networks(found.look(folders.compared(tmp_path / name, **more))))
        assert read.text.startswith("not told: ")
