"""What a run of vLLM's tests says, and what several runs say together."""

from __future__ import annotations

from tests.conformance.outcomes import Outcome, Run, is_flaky, parse, to_rerun, verdict

PASSED, FAILED, SKIPPED = Outcome.PASSED, Outcome.FAILED, Outcome.SKIPPED
THEIRS, OURS = "vllm serve", "vllm-pd up"


def case(name: str, inside: str = "") -> str:
    properties = f'<properties><property name="nodeid" value="{name}"/></properties>'
    return f'<testcase classname="c" name="n">{properties}{inside}</testcase>'


def junit(*cases: str) -> str:
    return f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"


def run(**tests: Outcome) -> Run:
    return Run(tests)


def test_each_test_of_a_junit_file_has_its_outcome() -> None:
    found = parse(
        junit(
            case("m.py::a"),
            case("m.py::b", '<failure message="assert 1 == 2\n more">trace</failure>'),
            case("m.py::c", '<error message="failed on setup">trace</error>'),
            case("m.py::d", '<skipped type="pytest.skip" message="no GPU"/>'),
        )
    )
    assert found.tests == {
        "m.py::a": PASSED,
        "m.py::b": FAILED,
        "m.py::c": FAILED,
        "m.py::d": SKIPPED,
    }
    assert found.messages == {"m.py::b": "assert 1 == 2 more", "m.py::c": "failed on setup"}
    assert not found.trouble


def test_a_test_that_passes_and_whose_fixture_then_fails_has_failed() -> None:
    broken = '<error message="failed on teardown">trace</error>'
    for cases in ((case("a"), case("a", broken)), (case("a", broken), case("a"))):
        assert parse(junit(*cases)).tests == {"a": FAILED}


def test_a_module_that_cannot_be_imported_is_trouble_and_no_test() -> None:
    lines = "Traceback\nE   ModuleNotFoundError: No module named 'x'"
    broken = f'<error message="collection failure">{lines}</error>'
    found = parse(junit(f'<testcase classname="" name="tests.m">{broken}</testcase>'))
    assert not found.tests
    assert found.trouble == "E ModuleNotFoundError: No module named 'x'"


def test_what_passes_at_once_on_both_arms_is_not_run_again() -> None:
    arms = {THEIRS: [run(a=PASSED, b=SKIPPED)], OURS: [run(a=PASSED, b=SKIPPED)]}
    assert to_rerun(arms) == {THEIRS: [], OURS: []}


def test_a_failure_is_run_again_on_both_arms() -> None:
    arms = {THEIRS: [run(a=PASSED, b=PASSED)], OURS: [run(a=PASSED, b=FAILED)]}
    assert to_rerun(arms) == {THEIRS: ["b"], OURS: ["b"]}


def test_a_test_that_one_arm_did_not_reach_is_run_again_on_both() -> None:
    arms = {THEIRS: [run(a=PASSED, b=PASSED)], OURS: [run(a=PASSED)]}
    assert to_rerun(arms) == {THEIRS: ["b"], OURS: ["b"]}


def test_two_runs_that_agree_are_enough() -> None:
    arms = {THEIRS: [run(a=PASSED), run(a=PASSED)], OURS: [run(a=FAILED), run(a=PASSED)]}
    assert to_rerun(arms) == {THEIRS: [], OURS: ["a"]}


def test_nothing_is_run_a_fourth_time() -> None:
    ours = [run(a=FAILED), run(a=PASSED), run()]
    assert to_rerun({THEIRS: [run(a=PASSED), run(a=PASSED)], OURS: ours}) == {THEIRS: []}


def test_what_two_of_three_runs_say_counts() -> None:
    assert verdict("a", [run(a=FAILED), run(a=PASSED), run(a=PASSED)]) is PASSED
    assert verdict("a", [run(a=FAILED), run(a=PASSED), run(a=FAILED)]) is FAILED


def test_without_agreement_the_failure_counts() -> None:
    assert verdict("a", [run(a=PASSED), run(a=FAILED)]) is FAILED


def test_a_test_that_no_run_reached_is_neither_passed_nor_failed() -> None:
    assert verdict("a", [run(), run(b=PASSED)]) is Outcome.NOT_RUN


def test_a_test_of_two_minds_is_flaky() -> None:
    assert is_flaky("a", [run(a=FAILED), run(a=PASSED), run(a=PASSED)])
    assert not is_flaky("a", [run(a=FAILED), run(), run(a=FAILED)])
