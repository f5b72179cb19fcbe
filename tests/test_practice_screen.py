"""The mock interview on the whole screen, driven by keys without a terminal (Textual's Pilot)."""

import asyncio

import pytest
from practice_helpers import RUBRIC, use_bank
from textual.widgets import Digits, Markdown, SelectionList

from course.practice import bank, mock, screen, tasks
from course.practice.answers import Answers
from course.practice.journal import Journal
from course.practice.screen import ANSWERED, ASKED, OVER, READY, Screen

KINDS = bank.Choice(kinds=("estimate", "debugging", "design"))


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Run ``script(app, pilot)`` on a screen with an estimate, a case and a design, or with what ``choice`` takes."""
    data = use_bank(tmp_path, monkeypatch)

    def run(script, choice=KINDS, with_tasks=(), size=(100, 32), **more):
        plan = mock.compose(bank.items(), with_tasks, 30, choice, {}, 1)
        with Answers() as answers:
            app = Screen(mock.Interview(plan, Journal(data)), answers, tmp_path / "sheets", **more)

            async def drive():
                async with app.run_test(size=size) as pilot:
                    await pilot.pause()
                    await script(app, pilot)

            asyncio.run(drive())
        return app

    run.journal = Journal(data)
    return run


async def press(app, pilot, *keys: str) -> None:
    """Press keys, each once what the last one began is done."""
    for key in keys:
        await pilot.press(key)
        for _ in range(200):
            await pilot.pause(0.02)
            if not app.workers and app.state != screen.COMPUTING:
                break
        await pilot.pause()


def shown(app) -> str:
    return "\n".join(str(app.query_one(f"#{name}", Markdown).source) for name in ("question", "answer"))


def test_question_answer_rating(play):
    async def script(app, pilot):
        assert app.state == READY and "30 minutes, 3 questions" in shown(app)
        await press(app, pilot, "enter")
        assert app.state == ASKED and "What about an-estimate?" in shown(app) and "Short on" not in shown(app)
        await press(app, pilot, "3")
        assert app.state == ASKED and not app.interview.given, "no rating before the answer"
        await press(app, pilot, "enter")
        assert app.state == ANSWERED
        for text in ("Short on an-estimate.", "Deep on an-estimate: σᵣ ≤ 1.", "And then?", "The wrong one."):
            assert text.replace("σᵣ", "").split(":")[0] in shown(app)
        await press(app, pilot, "4")
        assert app.interview.at == 1 and "What about a-case?" in shown(app)
        assert "course case 01_alpha_forgotten" in shown(app)

    play(script)
    (review,) = play.journal.reviews()
    assert (review.question, review.rating, review.by) == ("an-estimate", 4, "interview") and review.seconds > 0


def test_a_design_is_rated_by_ticks(play):
    async def script(app, pilot):
        await press(app, pilot, "enter", "enter")
        chooser = app.query_one("#rubric", SelectionList)
        assert [str(chooser.get_option_at_index(i).prompt) for i in range(4)] == RUBRIC and chooser.has_focus
        await press(app, pilot, "3")
        assert app.state == ANSWERED, "keys of the rating do nothing where the rubric rates"
        await press(app, pilot, "space", "down", "space", "enter")
        assert app.state == OVER and app.interview.met == {0: [True, True, False, False]}
        await press(app, pilot, "q")

    app = play(script, bank.Choice(kinds=("design",)))
    assert [review.rating for review in play.journal.reviews()] == [3]
    assert mock.rubric(app.interview)[3].found == "2 of 4 points of the rubric"


def test_the_clock_stands_still_while_paused_and_while_one_reads(play):
    now = [100.0]

    async def script(app, pilot):
        await press(app, pilot, "enter")
        now[0] += 30
        await press(app, pilot, "p")
        now[0] += 500
        await press(app, pilot, "p")
        now[0] += 12
        await press(app, pilot, "enter")
        now[0] += 500
        assert app.interview.seconds[0] == pytest.approx(42)
        await press(app, pilot, "3")
        now[0] += 60 * app.interview.part.minutes + 65
        app._tick()
        assert app.query_one("#clock", Digits).value == "-1:05" and app.query_one("#clock").has_class("late")

    play(script, now=lambda: now[0])


def test_skip_back_and_end(play):
    async def script(app, pilot):
        await press(app, pilot, "enter", "s", "b")
        assert app.interview.at == 0 and app.state == ASKED
        await press(app, pilot, "enter", "2", "q")
        assert app.state == OVER
        await press(app, pilot, "q")
        assert not app.is_running or app._exit

    play(script)
    assert [review.rating for review in play.journal.reviews()] == [2]


def test_what_was_rated_is_on_the_disk_at_once(play):
    async def script(app, pilot):
        await press(app, pilot, "enter", "enter", "1")
        assert [review.rating for review in play.journal.reviews()] == [1]

    play(script)


def test_a_coding_task_is_handed_out_and_judged(play, monkeypatch):
    (task,) = [task for task in tasks.tasks() if task.key == "03.2"]
    judged = []
    monkeypatch.setattr(tasks, "judged", lambda task, sheet: judged.append(sheet) or ["2. A zero point: nothing here yet"])

    async def script(app, pilot):
        await press(app, pilot, "enter")
        assert app.sheet.exists() and app.sheet.name in shown(app) and "details" not in shown(app)
        await press(app, pilot, "enter")
        assert judged == [app.sheet] and "nothing here yet" in shown(app)
        await press(app, pilot, "4")
        assert app.state == ANSWERED, "what does not pass is hard at best"
        await press(app, pilot, "2")
        assert app.state == OVER

    play(script, bank.Choice(units=("03",), kinds=("coding",)), [task])


@pytest.mark.parametrize("size, narrow", [((80, 24), True), ((120, 40), False)])
def test_the_agenda_has_its_place_where_there_is_room(play, size, narrow):
    async def script(app, pilot):
        await press(app, pilot, "enter")
        assert app.query_one("#agenda").display is not narrow
        assert app.query_one("#body").region.width >= 60 and app.query_one("Footer").region.bottom == size[1]

    play(script, size=size)


def test_an_answer_that_cannot_be_computed_is_said(play, monkeypatch):
    from course.units import CourseError

    def fails(self, name):
        raise CourseError(f"the answer to {name!r} could not be computed")

    async def script(app, pilot):
        monkeypatch.setattr(Answers, "get", fails)
        await pilot.press("enter")
        await pilot.pause(0.2)
        await pilot.press("enter")
        await pilot.pause(0.3)
        assert app.return_code is None and not app.interview.given
        await press(app, pilot, "s")
        assert app.interview.at == 1

    play(script)
