"""Rewards and environments in workers of Ray: what they say in this process, one killed or hanging, too little room."""

import os
import signal
import threading
import time

import pytest

from experiments.first_light.make_tokenizer import FOLDER
from functional_trainer import cluster
from functional_trainer.cluster import Crew, Job, Pools
from functional_trainer.data import Tokenizer
from functional_trainer.environments import Environment, shipped, stage
from functional_trainer.environments.episodes import Episodes, report
from functional_trainer.environments.tools import Call
from functional_trainer.rewards import Rewards, code, code_share
from tests.functional_trainer.test_environments import SAMPLING, Script, calling, encoded, play, user
from tests.functional_trainer.test_rewards import samples

pytestmark = pytest.mark.slow
TOKENIZER = Tokenizer(FOLDER)
TURN = encoded(TOKENIZER, "12")


@pytest.fixture(scope="module", autouse=True)
def room():
    """A cluster of six cores: two workers for rewards, two for environments, two for others."""
    import ray

    os.environ.pop("RAY_ADDRESS", None)
    cluster.connect(6)
    yield
    ray.shutdown()


def processes(crew: Crew) -> list[int]:
    import ray

    return ray.get([worker.process.remote() for worker in crew.workers])


def later(seconds: float, pid: int) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
    timer.start()
    return timer


# rewards --------------------------------------------------------------------------------------------------------------


def judges():
    """Return functions that travel by value: this module imports much."""

    def moody(completions, moods, **columns):
        import os
        import time

        (mood,) = moods
        if mood == "raise":
            raise KeyError("gone")
        if mood == "exit":
            os._exit(3)
        if mood == "worker":
            os.kill(os.getppid(), 9)
        while mood in ("hang", "worker"):
            time.sleep(1)
        return [len(completions[0]) + 0.5] if mood != "none" else [None]

    def slow(completions, log, **columns):
        import time

        with open(log[0], "a") as file:
            print(completions[0], file=file)
        time.sleep(0.2)
        return [float(completions[0])]

    return {"moody": moody}, {"slow": slow}


MOODY, SLOW = judges()


@pytest.fixture(scope="module")
def moody():
    with Rewards(MOODY, isolate=["moody"], ray=2, seconds=2) as made:
        yield made


def test_rewards_are_those_of_processes_here(moody):
    given = samples(7, moods=["fine", "raise", "exit", "hang", "none", "fine", "fine"])
    with Rewards(MOODY, isolate=["moody"], workers=2, seconds=2) as here:
        wanted = here(**given)
    assert wanted.failures["moody"] == {"raised": 1, "died": 1, "timed out": 1}
    assert moody(**given) == wanted


def test_code_is_confined_there_as_here():
    given = samples(4, tests=[["assert x == 1"]] * 4)
    given["completions"] = ["x = 1", "x = 2", "import socket\nsocket.socket()\nx = 1", "while True: pass"]
    how = {"code": code, "share": code_share}
    with Rewards(how, workers=1, seconds=2) as here:
        wanted = here(**given)
    with Rewards(how, ray=2, seconds=2) as there:
        assert there(**given) == wanted and wanted.each["code"] == [1, 0, 0, 0]


def test_a_worker_for_rewards_is_killed_in_the_middle(tmp_path):
    given = samples(20, log=[str(tmp_path / "log")] * 20)
    with Rewards(SLOW, isolate=["slow"], ray=2) as made:
        before = processes(made.pools["slow"].crew)
        begun, killer = time.monotonic(), later(0.9, before[0])
        scores = made(**given)
        killer.join()
        after = processes(made.pools["slow"].crew)
    assert scores.total == list(range(20)) and not scores.failures["slow"], "no sample is missing, none is there twice"
    asked = (tmp_path / "log").read_text().split()
    assert len(asked) == 21 and len({*asked}) == 20, "the one that was under way is asked again"
    assert before[0] not in after and before[1] in after and time.monotonic() - begun < 60


def test_a_sample_that_costs_every_worker_is_counted_once(moody):
    scores = moody(**samples(6, moods=["fine", "worker", "fine", "fine", "fine", "fine"]))
    assert scores.total == [1.5, None, *[1.5] * 4] and scores.failures["moody"] == {"died": 1}
    assert moody(**samples(4, moods=["fine"] * 4)).total == [1.5] * 4


def test_a_function_that_cannot_be_loaded_there_ends_the_run():
    def unloadable():
        raise OSError("no such model")

    crew = Crew(Pools, ({"f": {"function": len, "seconds": 1, "prepare": unloadable}},), 1, "workers")
    with pytest.raises(RuntimeError, match="cannot load the function: OSError: no such model"):
        cluster.RayPool(crew, "f", 1.0).map([{}])
    crew.close()
    with pytest.raises(ValueError, match="what workers are made of cannot be sent to them"):
        Crew(Pools, (threading.Lock(),), 1, "workers")

    class Shy:
        def __reduce__(self):
            raise OSError("no")

    with pytest.raises(ValueError, match="what workers are made of cannot be sent to them"):
        Crew(Pools, (Shy(),), 1, "workers")
    Crew(Pools, ({},), 2, "workers").close()  # there is room: the places of these were given back


# environments ---------------------------------------------------------------------------------------------------------


def talker():
    """Return an environment that travels by value, and does what its row says at each turn."""
    from functional_trainer.environments import Environment, Step

    class Talker(Environment):
        def reset(self, row):
            self.row, self.turn = row, 0
            return [{"role": "user", "content": "q"}]

        def step(self, messages):
            import ctypes
            import os
            import threading
            import time

            doing = self.row["turns"][self.turn]
            self.turn += 1
            if doing == "raise":
                raise SystemExit("over")
            if doing == "die":
                os._exit(1)
            if doing == "freeze":
                ctypes.PyDLL(None).sleep(600)  # and keep the interpreter
            while doing == "hang":
                pass
            if doing == "odd":
                return threading.Lock()
            if doing == "own":

                class Own(Exception):
                    def __init__(self, number, text):
                        super().__init__(f"{text} {number}")

                raise Own(3, "number")
            time.sleep(self.row.get("slow", 0))
            said = {"role": "user", "content": f"{doing} {len(messages)}"}
            return Step([said], 0.5, self.turn == len(self.row["turns"]))

    return Talker


TALKER = talker()


def told(*turns: str, **more) -> dict:
    return {"turns": turns, **more}


class Steady(Script):
    """An engine that always says the same, and may kill a process before the second turn."""

    victim = 0

    def generate(self, prompts, sampling, begun):
        self.turns = [[TURN] * len(prompts)] * (len(self.prompts) + 1)
        if self.victim and len(self.prompts) == 1:
            os.kill(self.victim, signal.SIGKILL)
            time.sleep(0.5)
        return super().generate(prompts, sampling, begun)


@pytest.fixture(scope="module")
def two():
    made = Episodes(TALKER, TOKENIZER, seconds=2, ray=2)
    yield made
    made.close()


def test_episodes_are_those_of_environments_here(two):
    turns = ["a b c", "a raise", "odd", "a", "hang", "a b c d", "a b", "own"]
    rows = [told(*some.split()) for some in turns]
    here = Episodes(TALKER, TOKENIZER, seconds=2)
    wanted, found = play(here, Steady([]), rows), play(two, Steady([]), rows)
    here.close()
    assert [s.reward for s in wanted] == [1.5, None, None, 0.5, None, 2.0, 1.0, None]
    errors = ["", "SystemExit: over", "TypeError: ", "", "TimeoutError: its step took over 2 s", "", "", ""]
    assert wanted[-1].episode.error == "Own: number 3" and found[-1].episode.error == "RuntimeError: Own: number 3"
    for theirs, ours, error in zip(found, wanted, errors, strict=True):
        assert theirs.episode.error.startswith(error) and ours.episode.error.startswith(error)
        whole = [one._replace(episode=one.episode._replace(error="")) for one in (theirs, ours)]
        assert whole[0] == whole[1]
    assert report(found) == report(wanted) and report(found)["environment/raised"] == 4


def test_tools_run_there_too():
    rows = [{"question": f"What is {n} * 3?", "answer": str(3 * n)} for n in range(41, 45)]
    said = [[calling(TOKENIZER, f"{n} * 3") for n in range(41, 45)], [encoded(TOKENIZER, "123")] * 4]
    both = []
    for ray in (0, 1):
        episodes = Episodes(shipped.Calculator, TOKENIZER, ray=ray)
        both.append(play(episodes, Script(said), rows))
        episodes.close()
    assert both[0] == both[1] and [s.reward for s in both[0]] == [1, 0, 0, 0]


def test_a_worker_for_environments_is_killed_between_turns(two):
    rows = [told("a", "b", "c")] * 10
    here = Episodes(TALKER, TOKENIZER)
    wanted = play(here, Steady([]), rows)
    here.close()
    prompts = [two.turns.prompt([user("q")])] * 10
    engine, before = Steady([], stop=TOKENIZER.eos_ids), processes(two.stage.crew)
    engine.victim = before[0]
    begun = time.monotonic()
    samples = two(engine, prompts, rows, SAMPLING)
    assert time.monotonic() - begun < 60 and len(samples) == 10
    lost = [i for i, s in enumerate(samples) if s.episode.error]
    assert len(lost) == 5 == report(samples)["environment/raised"], "those of one worker, each counted once"
    kept = [i for i in range(10) if i not in lost]
    assert [samples[i] for i in kept] == [wanted[i] for i in kept]
    assert all(samples[i].reward is None and "its worker was lost" in samples[i].episode.error for i in lost)
    assert before[1] in processes(two.stage.crew) and before[0] not in processes(two.stage.crew)
    assert play(two, Steady([]), rows) == wanted


def test_a_worker_for_environments_is_killed_in_a_step(two):
    rows = [told("a", "b", slow=0.3)] * 6
    wanted = play(two, Steady([]), rows)
    prompts = [two.turns.prompt([user("q")])] * 6
    killer = later(0.4, processes(two.stage.crew)[1])
    samples = two(Steady([], stop=TOKENIZER.eos_ids), prompts, rows, SAMPLING)
    killer.join()
    lost = [i for i, s in enumerate(samples) if s.episode.error]
    assert len(lost) == 3 and all(samples[i] == wanted[i] for i in range(6) if i not in lost)


def test_one_that_died_between_rollouts_costs_nothing(two):
    rows = [told("a", "b")] * 6
    for pid in processes(two.stage.crew):
        os.kill(pid, signal.SIGKILL)
    assert [s.reward for s in play(two, Steady([]), rows)] == [1.0] * 6


@pytest.mark.parametrize("end", ["die", "freeze"])
def test_what_no_thread_can_end_costs_the_episodes_of_its_worker(two, monkeypatch, end):
    """The process ends, or a loop in C keeps the interpreter to itself."""
    monkeypatch.setattr(stage, "SLACK", 1.0)
    rows = [told("a", "b"), told("a", end), *[told("a", "b")] * 58]
    begun = time.monotonic()
    samples = play(two, Steady([]), rows)
    assert time.monotonic() - begun < 30, "not the time of all episodes, that is a minute"
    assert [s.reward for s in samples] == [1.0, None] * 30 and report(samples)["environment/raised"] == 30
    assert [s.reward for s in play(two, Steady([]), [told("a")] * 4)] == [0.5] * 4


def test_a_worker_that_is_there_may_take_long(two, monkeypatch):
    monkeypatch.setattr(stage, "SLACK", -1.5)  # of 2 seconds; it has 16 calls of 0.2
    assert [s.reward for s in play(two, Steady([]), [told("a", slow=0.2)] * 32)] == [0.5] * 32


def test_tools_do_not_end_the_workers_of_environments():
    episodes = Episodes(shipped.Calculator, TOKENIZER, ray=1)
    episodes.tools.close()
    assert len(processes(episodes.stage.crew)) == 1
    episodes.close()
    with pytest.raises(RuntimeError, match="the pool is closed"):
        episodes.tools([Call("calculator", {"expression": "2 * 3"})])


def test_tools_of_one_name_are_refused_before_there_are_workers(monkeypatch):
    class Two(Environment):
        tools = (shipped.Calculator.tools[0],) * 2

    monkeypatch.setattr(cluster, "ROOM", 0.0)
    with pytest.raises(ValueError, match="two tools have the same name: there are 2, named calculat"):
        Episodes(Two, TOKENIZER, ray=1)


# what is under way ----------------------------------------------------------------------------------------------------


def slow_pools():
    """Return the arguments of `Pools` with a function that takes as long as it is told, and says it."""

    def wait(seconds):
        import time

        time.sleep(seconds)
        return seconds

    return ({"wait": {"function": wait, "seconds": 60}},)


def ask(worker, seconds):
    return worker.call.remote("wait", {"seconds": seconds})


@pytest.fixture
def crew():
    made = Crew(Pools, slow_pools(), 2, "workers")
    assert [answer.value for _, answer in made.work([Job(0.0)] * 2, ask, 60.0)] == [0.0] * 2
    yield made
    made.close()


def test_workers_whose_answers_nobody_takes_are_replaced(crew):
    before, begun = processes(crew), time.monotonic()
    for what, _ in crew.work([Job(0.1), Job(50.0)], ask, 60.0):
        assert what == 0.1
        break
    assert [answer.value for _, answer in crew.work([Job(0.0)] * 2, ask, 60.0)] == [0.0] * 2
    assert time.monotonic() - begun < 30 and len({*before} & {*processes(crew)}) == 1


def test_one_that_hangs_is_seen_while_others_answer(crew):
    begun = time.monotonic()
    for what, answer in crew.work([Job(50.0)] + [Job(0.3)] * 15, ask, 1.0, tries=1):
        if what == 50.0:
            assert answer == cluster.Lost("took over 1 s") and time.monotonic() - begun < 3
            return
    raise AssertionError("it was not seen")


def test_what_ray_loses_is_lost_whatever_it_is_called(crew, monkeypatch):
    """There are more errors of Ray than that of a dead actor; what a job raises is raised."""
    import ray

    get, left = ray.get, [ray.exceptions.OutOfMemoryError("full"), ray.exceptions.ObjectLostError("00", None, "")]

    def failing(ref, **how):
        if left:
            raise left.pop()
        return get(ref, **how)

    monkeypatch.setattr(ray, "get", failing)
    assert [answer.value for _, answer in crew.work([Job(0.0)], ask, 60.0)] == [0.0] and not left
    left += [ray.exceptions.OutOfMemoryError("full")]
    crew.until = [0.0] * 2
    assert [answer.value for _, answer in crew.work([Job(0.0)], ask, 60.0)] == [0.0] and not left
    with pytest.raises(KeyError):
        list(crew.work([Job(0.0)], lambda worker, what: worker.call.remote("none", {}), 60.0))


def test_a_crew_that_is_closed_says_so(crew):
    crew.close()
    with pytest.raises(RuntimeError, match="the pool is closed"):
        list(crew.work([Job(0.0)], ask, 1.0))


# room -----------------------------------------------------------------------------------------------------------------


def test_a_cluster_that_is_too_small_is_told_at_once(monkeypatch):
    monkeypatch.setattr(cluster, "ROOM", 1.0)
    begun = time.monotonic()
    said = r"no room for 9 judges: they want 9 CPUs, it has 6, \d free"
    with pytest.raises(RuntimeError, match=said):
        Crew(Pools, ({},), 9, "judges")
    with pytest.raises(RuntimeError, match="they want 1 CPUs, it has 6, \\d free; and 1 GPUs, it has 0, 0 free"):
        Crew(Pools, ({},), 1, "judges", gpus=1)
    assert time.monotonic() - begun < 10


def test_workers_that_do_not_start_end_the_run():
    class Stillborn(Pools):
        def __init__(self):
            raise OSError("no room")

    crew = Crew(Stillborn, (), 1, "judges")
    with pytest.raises(RuntimeError, match="3 judges in a row did not start: (.|\n)*no room"):
        list(crew.work([Job(0)], lambda worker, what: worker.call.remote(), 10.0))
    crew.close()
