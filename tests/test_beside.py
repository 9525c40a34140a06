"""A program that asks for numbers is served in the thread that waits for it."""

from __future__ import annotations

import threading

import pytest

from fedbilevel.beside import Served, alone


def here() -> int:
    return threading.get_ident()


def test_what_a_program_asks_for_is_done_in_the_caller_s_thread():
    """Also where several of its threads ask at a time, one after the other."""
    served, running = Served(), []

    def counted(number):
        running.append(number)
        assert len(running) == 1
        running.pop()
        return here(), number**2

    def program():
        found: dict[int, tuple[int, int]] = {}
        ask = lambda k: found.update({k: served.ask(counted, k)})
        threads = [threading.Thread(target=ask, args=(k,)) for k in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found, here()

    found, beside = served.run(program)
    assert found == {k: (here(), k**2) for k in range(20)}
    assert beside != here()


def test_what_is_raised_comes_up_where_it_belongs():
    served, heard = Served(), []

    def wrong():
        raise KeyError("no")

    def program():
        try:
            served.ask(wrong)
        except KeyError as error:
            heard.append(error)
        raise ValueError("the program's own")

    with pytest.raises(ValueError, match="the program's own"):
        served.run(program)
    assert len(heard) == 1
    assert Served().run(lambda: alone(lambda a: a + 1, 2)) == 3


def test_an_interruption_is_heard_at_the_end():
    """The program is told, and comes to its end first."""
    served, ended = Served(), []

    def interrupted():
        raise KeyboardInterrupt

    def program():
        try:
            served.ask(interrupted)
        finally:
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        served.run(program)
    assert ended == [True]


def test_programs_one_after_the_other_run_in_few_threads():
    """A thread of its own for each would have C's library keep memory for each."""
    names = set()
    for _ in range(20):
        Served().run(lambda: names.add(threading.get_ident()))
    assert len(names) <= 3  # one may not have heard yet that it is done
