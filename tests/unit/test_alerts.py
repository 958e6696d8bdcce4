"""What the dashboard and the alert rules say of a run in which things went wrong.

The run is a frontend's own: its dispatch, its metrics and its requests, over engines that a test
lets come and go. Its ``/metrics`` is read every 15 seconds into a file, as Prometheus would. What
no such run shows is made up: series that grow, or stay, as they would while something is wrong.
"""

from __future__ import annotations

import asyncio
import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import prometheus_client
import pytest

from tests.fakes import dispatching
from tests.fakes.courses import make_request
from tests.fakes.dispatching import World
from tests.fakes.series import counting
from tests.promql import Database, query, write_samples

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine import FinishReason

    from tests.fakes.engine_core import describe
    from tests.fakes.links import FakeLink, output_of
    from tests.monitoring import alerts, page_queries, panels
    from tests.unit.frontend.test_dispatch_outage import Outage
    from vllm_pd_plugin.frontend.requests.context import _CURRENT, RequestContext
    from vllm_pd_plugin.frontend.routing.choice import Role
    from vllm_pd_plugin.frontend.telemetry.outcomes import Objectives

PHASE_S = 1000
SCRAPE_S = 15.0
_RECENT = 50
SLO = Objectives(0.5, 0.1)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Series of a run, and when each part of it had lasted for a while; in seconds.

    outcomes: how its requests ended, as their clients saw it.
    """

    series: Database
    healthy_at: float
    outage_at: float
    slow_at: float
    recovered_at: float
    outcomes: dict[str, int]


class Traffic:
    """A request of class ``fast`` every second, and one every ten seconds of no class.

    first_token_s: how long its first token takes.
    """

    def __init__(self, world: World) -> None:
        self.first_token_s = 0.2
        self.outcomes: Counter[str] = Counter()
        self._world = world
        self._failed: set[str] = set()
        world.on_failed = lambda course, ending: self._failed.add(course.id)
        self._tasks: set[asyncio.Task[None]] = set()
        self._number = 0

    async def flow(self, seconds: int) -> None:
        for _ in range(seconds):
            self._number += 1
            self._begin("fast")
            if self._number % 10 == 0:
                self._begin("default")
            await asyncio.sleep(1.0)

    async def end(self) -> None:
        await asyncio.gather(*self._tasks)

    def _begin(self, slo_class: str) -> None:
        task = asyncio.create_task(self._request(self._number, slo_class))
        self._tasks.add(task)

    async def _request(self, number: int, slo_class: str) -> None:
        """A client's request, and the engine that works on it. Every seventh client leaves when it
        has waited for two seconds, the others wait."""
        world, request_id = self._world, f"{slo_class}-{number}"
        _CURRENT.set(RequestContext(slo_class))
        world.add(request_id)
        waited_s = 0.0
        while not (leg := self._leg(request_id)) or waited_s < self.first_token_s:
            await asyncio.sleep(0.1)
            waited_s += 0.1
            if request_id in self._failed:
                self.outcomes["failed"] += 1
                return
            if number % 7 == 0 and waited_s > 2.0:
                world.dispatch.abort([request_id])
                self.outcomes["gone"] += 1
                return
        assert leg is not None
        link, leg_id = leg
        world.give(link, output_of(leg_id, 50))
        await asyncio.sleep(0.05)
        world.give(link, output_of(leg_id, 51, finish=FinishReason.STOP))
        self.outcomes["answered"] += 1

    def _leg(self, request_id: str) -> tuple[FakeLink, str] | None:
        for member in self._world.dispatch.pool:
            link: FakeLink = member.link  # type: ignore[assignment]
            for leg_id in reversed(link.sent[-_RECENT:]):
                if leg_id.rsplit("-", 1)[0] == request_id and link.is_attached:
                    return link, leg_id
        return None


async def scrape(world: World, path: Path, more: Callable[[], str] = lambda: "") -> None:
    """Read a frontend's series into a file, for ever. more: others, as ``/metrics`` has them."""
    while True:
        lines = prometheus_client.generate_latest().decode().splitlines()
        text = "\n".join(line for line in lines if line.startswith("pd_"))
        where = {"job": "frontends", "instance": "f:8000"}
        write_samples(path, world.dispatch.now(), f"{text}\n{more()}", where)
        await asyncio.sleep(SCRAPE_S)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("run") / "series"
    times: list[float] = []
    outcomes: dict[str, int] = {}

    async def story(world: World) -> None:
        scraper = asyncio.create_task(scrape(world, path))
        traffic = Traffic(world)
        engine = world.engine("b", Role.BOTH)
        await traffic.flow(PHASE_S)
        times.append(world.dispatch.now())
        world.lose(engine)
        await traffic.flow(PHASE_S)
        times.append(world.dispatch.now())
        world.come_back(engine)
        traffic.first_token_s = 0.8
        await traffic.flow(PHASE_S)
        times.append(world.dispatch.now())
        traffic.first_token_s = 0.2
        await traffic.flow(PHASE_S)
        times.append(world.dispatch.now())
        await traffic.end()
        await asyncio.sleep(2 * SCRAPE_S)
        scraper.cancel()
        outcomes.update(traffic.outcomes)

    with counting({"fast": SLO}) as metrics:
        dispatching.run(story, metrics=metrics)
    healthy_at, outage_at, slow_at, recovered_at = times
    return Run(Database(path), healthy_at, outage_at, slow_at, recovered_at, outcomes)


def value(run: Run, expression: str, at: float, **labels: str) -> float:
    found = query(expression.replace("$__rate_interval", "5m"), run.series, at)
    assert isinstance(found, dict)
    return found[frozenset(labels.items())]


def panel(title: str) -> str:
    """The expression of a panel, for all jobs and instances."""
    found = [each["targets"][0]["expr"] for each in panels() if each["title"] == title]
    (expression,) = (each for each in found if "pd_frontend" in each)
    for variable in ("job", "instance", "slo_class"):
        expression = expression.replace(f'"${variable}"', '".*"')
    text: str = expression
    return text


def firing(series: Database, at: float) -> set[str]:
    """The alerts whose condition holds, and has for as long as they want."""
    found = set()
    for rule in alerts():
        minutes = int(rule.get("for", "0m").rstrip("m"))
        looks = [at - 15.0 * i for i in range(minutes * 4 + 1)]
        if all(query(rule["expr"], series, look) for look in looks):
            found.add(rule["alert"])
    return found


def test_the_run_has_all_kinds_of_ends(run: Run) -> None:
    assert set(run.outcomes) == {"answered", "failed", "gone"}
    assert min(run.outcomes.values()) > 100


def test_every_request_is_counted_by_how_it_ended(run: Run) -> None:
    at = run.recovered_at + SCRAPE_S
    counted = query("sum by (outcome) (pd_frontend_requests_total)", run.series, at)
    assert isinstance(counted, dict)
    by_outcome = {dict(labels)["outcome"]: count for labels, count in counted.items()}
    assert {name: count for name, count in by_outcome.items() if count} == run.outcomes


SHARES = [panel("Share that met both objectives"), page_queries()[0].expression]


@pytest.mark.parametrize("share", SHARES, ids=["dashboard", "page"])
def test_the_share_within_the_objectives_falls_when_nothing_works(run: Run, share: str) -> None:
    assert value(run, share, run.healthy_at, slo_class="fast") == pytest.approx(1.0)
    assert value(run, share, run.outage_at, slo_class="fast") == 0.0
    assert value(run, share, run.outage_at, slo_class="default") == 0.0
    # Late answers are bad where something was promised, and only there.
    assert value(run, share, run.slow_at, slo_class="fast") == 0.0
    assert value(run, share, run.slow_at, slo_class="default") == pytest.approx(1.0)
    assert value(run, share, run.recovered_at, slo_class="fast") == pytest.approx(1.0)


def test_what_the_share_was_taken_of_before_saw_no_outage(run: Run) -> None:
    answered = (
        "sum by (slo_class) (rate(pd_frontend_goodput_requests_total[5m])) / "
        'sum by (slo_class) (rate(pd_frontend_requests_total{outcome="answered"}[5m]))'
    )
    found = query(answered, run.series, run.outage_at)
    assert isinstance(found, dict)
    assert not [share for share in found.values() if share < 1]


def test_failures_have_their_reason(run: Run) -> None:
    failures = panel("Failures by reason")
    assert value(run, failures, run.healthy_at, reason="no_engine") == 0
    assert value(run, failures, run.outage_at, reason="no_engine") > 0.5


def test_the_time_to_the_first_token_is_seen(run: Run) -> None:
    median = panel("TTFT")
    assert value(run, median, run.healthy_at) < 0.35
    assert value(run, median, run.slow_at) > 0.7


OF_WAITING = "VllmPdRequestsWaitForEngines"
OF_AN_OUTAGE = {
    "VllmPdNoDecodeEngine", "VllmPdNoPrefillEngine", "VllmPdGoodputLow", "VllmPdRequestsFail",
    OF_WAITING,
}  # fmt: skip
OF_PAIRS = "VllmPdPairsOpen"


def test_alerts_fire_when_they_should_and_only_then(run: Run) -> None:
    assert firing(run.series, run.healthy_at) == set()
    assert firing(run.series, run.outage_at) == OF_AN_OUTAGE
    assert firing(run.series, run.slow_at) == {"VllmPdGoodputLow"}
    assert firing(run.series, run.recovered_at) == set()


def test_a_queue_for_engines_that_are_busy_is_no_wait_for_one_that_is_missing(
    tmp_path: Path,
) -> None:
    """A busy engine, all the time; from the middle on an adapter, for an engine that is down."""
    path = tmp_path / "series"
    times: list[float] = []

    async def story(world: World) -> None:
        scraper = asyncio.create_task(scrape(world, path))
        busy = world.engine("b", Role.BOTH)
        busy.description = describe(role="both", max_num_seqs=1)
        for number in range(2 * PHASE_S):
            world.add(f"r{number}")  # each has 5 s, and two get one
            if number == PHASE_S:
                times.append(world.dispatch.now())
            if number > PHASE_S:
                request = make_request(f"a{number}")
                request.lora_request = LoRARequest("a", 2_000_000, "/a")
                world.dispatch.add(request)
            await asyncio.sleep(1.0)
        times.append(world.dispatch.now())
        scraper.cancel()

    with counting({}) as metrics:
        dispatching.run(story, metrics=metrics)
    series, (queue_at, missing_at) = Database(path), times
    for at, is_missing in ((queue_at, False), (missing_at, True)):
        assert query("sum(pd_frontend_requests_waiting) > 3", series, at)
        assert (OF_WAITING in firing(series, at)) is is_missing


def test_an_alert_lasts_as_long_as_nothing_can_be_handed_over(tmp_path: Path) -> None:
    """Of handoffs in vain there is one a minute then, which no rate tells from bad luck."""
    path = tmp_path / "series"
    times: list[float] = []

    async def story(world: World) -> None:
        p, d = world.pair()

        def of_engine() -> str:
            number = sum(leg_id.endswith("d") for leg_id in d.sent)
            return f'pd_handoff_failures_total{{reason="read_failed"}} {number}'

        outage = Outage(world)
        scraper = asyncio.create_task(scrape(world, path, of_engine))
        await asyncio.sleep(PHASE_S)
        times.append(world.dispatch.now())
        for number in range(2 * PHASE_S):
            await outage.ask(f"r{number}", p, d)
        times.append(world.dispatch.now())
        scraper.cancel()

    with counting({}) as metrics:
        dispatching.run(story, metrics=metrics)
    series, (begun_at, later) = Database(path), times
    assert firing(series, begun_at) == set()
    assert OF_PAIRS in firing(series, begun_at + 330)
    assert firing(series, later) == {OF_PAIRS}


Told = Mapping[str, float]
"""By series: by how much a counter grows from one scrape to the next, or what a gauge says."""
KV, WAITING = "vllm:kv_cache_usage_perc", "vllm:num_requests_waiting"
REQUESTS = 'pd_frontend_requests_total{slo_class="fast",outcome="%s"}'
RETRIES, ROUTES = 'pd_frontend_retries_total{reason="timeout"}', "pd_frontend_routes_total"
FAILURES, HANDOFFS = 'pd_handoff_failures_total{reason="%s"}', "pd_producer_handoffs_total"
EXPIRED, LOST = "pd_leases_expired_total", "pd_frontend_engines_lost_total"
FAULTS, LAG = "pd_faults_total", "pd_frontend_loop_lag_seconds"
TOLD: Mapping[str, tuple[Told, Told]] = {
    "VllmPdRequestsRefused": (
        {REQUESTS % "refused": 1, REQUESTS % "answered": 9},
        {REQUESTS % "refused": 1, REQUESTS % "answered": 99},
    ),
    "VllmPdFrontendLate": ({LAG: 0.6}, {LAG: 0.4}),
    "VllmPdAttemptsFail": ({RETRIES: 1, ROUTES: 10}, {RETRIES: 1, ROUTES: 100}),
    "VllmPdEnginesLost": ({LOST: 0.1}, {LOST: 0.05}),
    "VllmPdHandoffsFail": (
        {FAILURES % "read_failed": 0.5},
        {FAILURES % "read_failed": 0.2, FAILURES % "aborted": 9},
    ),
    "VllmPdLeasesExpire": ({EXPIRED: 1, HANDOFFS: 5}, {EXPIRED: 1, HANDOFFS: 20}),
    "VllmPdEngineFull": ({KV: 0.97, WAITING: 2}, {KV: 0.97, WAITING: 0}),
    "VllmPdFault": ({FAULTS: 0.01}, {FAULTS: 0}),
}
"""By alert, what is told while something is wrong, and while it is not that."""


def told(path: Path, series: Told) -> set[str]:
    """Return the alerts that fire when that was told for a while."""
    for number in range(PHASE_S // int(SCRAPE_S)):
        text = "\n".join(
            f"{name} {value * (number if '_total' in name else 1)}"
            for name, value in series.items()
        )
        write_samples(path, SCRAPE_S * number, text, {"job": "j", "instance": "i"})
    return firing(Database(path), SCRAPE_S * number)


@pytest.mark.parametrize("alert", TOLD)
def test_an_alert_fires_over_what_is_wrong_and_not_over_what_is_usual(
    tmp_path: Path, alert: str
) -> None:
    wrong, usual = TOLD[alert]
    assert told(tmp_path / "wrong", wrong) == {alert}
    assert told(tmp_path / "usual", usual) == set()


def test_a_frontend_that_shows_a_full_pool_is_no_full_engine(tmp_path: Path) -> None:
    full, _ = TOLD["VllmPdEngineFull"]
    assert told(tmp_path / "series", {**full, "pd_frontend_requests_open": 3}) == set()


def test_every_alert_was_seen_to_fire_here() -> None:
    assert {rule["alert"] for rule in alerts()} == OF_AN_OUTAGE | {OF_PAIRS} | set(TOLD)


def test_every_alert_says_what_is_wrong_and_how_bad_that_is() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)
    for rule in alerts():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
