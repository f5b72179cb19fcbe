"""``course interview --screen``: the mock interview on the whole screen, with a running clock. What happens is :class:`Interview`'s."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Digits, Footer, Label, Markdown, ProgressBar, SelectionList, Static

from course.interview import Question, in_terminal
from course.practice import tasks, words
from course.practice.answers import Answers
from course.practice.journal import RATINGS
from course.practice.mock import Interview, from_rubric
from course.practice.sitting import SHEETS, clock, closing

READY, ASKED, COMPUTING, ANSWERED, OVER = "ready", "asked", "computing", "answered", "over"


class Screen(App):
    """The interview; ``state`` is one of READY, ASKED, COMPUTING, ANSWERED and OVER.

    Args:
        interview: it goes on where it stands.
        answers: computes the answers meanwhile.
        sheets: the folder for coding tasks.
        now: seconds, from any beginning.
    """

    TITLE = "Mock interview"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #top { height: 5; padding: 1 2 0 2; background: $panel; }
    #title { width: 1fr; height: 3; }
    #clock { width: auto; height: 3; }
    #clock.late { color: $error; }
    #left { height: 1; padding: 0 2; background: $panel; }
    #left Bar { width: 1fr; }
    #agenda { width: 26; height: 1fr; padding: 1 2; background: $surface; border-right: solid $panel; }
    .narrow #agenda { display: none; }
    #body { padding: 0 2; }
    #body Markdown { margin: 0; padding: 1 0 0 0; max-width: 96; }
    #body #answer { border-left: thick $success; padding: 0 0 0 2; margin-top: 1; }
    #rubric { height: auto; max-height: 14; margin: 1 0; max-width: 96; }
    #say { height: auto; padding: 1 0; }
    .hidden { display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "go_on", "Reveal", priority=True),
        *(Binding(str(number), f"rate({number})", name) for number, (name, _) in RATINGS.items()),
        Binding("p", "pause", "Pause"),
        Binding("s", "skip", "Skip"),
        Binding("b", "back", "Back"),
        Binding("q", "finish", "End"),
        Binding("ctrl+c", "finish", show=False, priority=True),
    ]

    def __init__(self, interview: Interview, answers: Answers, sheets: Path = SHEETS, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.interview, self.answers, self.sheets = interview, answers, sheets
        self.state, self.paused, self.best = READY, False, max(RATINGS)
        self.question: Question | None = None
        self.sheet: Path | None = None
        self._now, self._since = now, now()

    def compose(self) -> ComposeResult:
        with Horizontal(id="top"):
            yield Label(id="title")
            yield Digits("0:00", id="clock")
        yield ProgressBar(total=100, show_eta=False, show_percentage=False, id="left")
        with Horizontal():
            yield Static(id="agenda")
            with VerticalScroll(id="body", can_focus=True), Vertical():
                yield Markdown(id="question")
                yield Markdown(id="answer", classes="hidden")
                yield SelectionList[int](id="rubric", classes="hidden")
                yield Static(id="say")
        yield Footer()

    async def on_mount(self) -> None:
        self.answers.ask(*(part.item.id for part in self.interview.plan.parts if part.item))
        self.set_interval(0.5, self._tick)
        notes = "".join(f"- {note}\n" for note in self.interview.plan.notes)
        await self._show(
            f"## {self.interview.minutes:.0f} minutes, {len(self.interview.plan.parts)} questions\n\n"
            f"Answer aloud, as if somebody sat there. The clock stands still while you read an answer.\n\n{notes}"
        )
        self._say("**Enter** begins.")
        self._frame()
        self.query_one("#body").focus()

    def on_resize(self, event) -> None:
        self.screen.set_class(event.size.width < 100, "narrow")

    # the clock

    @property
    def running(self) -> bool:
        return self.state == ASKED and not self.paused

    def _count(self) -> None:
        """Add what has passed since the last time to the part's own time."""
        now = self._now()
        if self.running:
            self.interview.spend(now - self._since)
        self._since = now

    def _tick(self) -> None:
        self._count()
        part, digits, bar = self.interview.part, self.query_one("#clock", Digits), self.query_one("#left", ProgressBar)
        if part is None or self.state in (READY, OVER):
            digits.update(clock(self.interview.used))
            return
        spent, whole = self.interview.seconds.get(self.interview.at, 0.0), 60 * part.minutes
        digits.update(clock(whole - spent) if spent <= whole else f"-{clock(spent - whole)}")
        digits.set_class(spent > whole, "late")
        bar.update(progress=100 * self.interview.used / (60 * self.interview.minutes))

    # what is shown

    async def _show(self, question: str, answer: str = "") -> None:
        await self.query_one("#question", Markdown).update(question)
        await self.query_one("#answer", Markdown).update(answer)
        self.query_one("#answer").set_class(not answer, "hidden")
        self.query_one("#rubric").add_class("hidden")

    def _say(self, text: str) -> None:
        self.query_one("#say", Static).update(words.markdown(text))

    def _frame(self) -> None:
        """Title, agenda and clock for where the interview stands."""
        interview, part = self.interview, self.interview.part
        if part is None:
            title = "[b]Over[/b]"
        else:
            about = words.about(part.item) if not part.task else f"unit {part.unit} · {part.task.minutes} min · no hints"
            title = (
                f"[b]Part {interview.at + 1} of {len(interview.plan.parts)} · {part.name} · {part.minutes:.0f} min[/b]\n[dim]{about}[/dim]"
            )
        self.query_one("#title", Label).update(
            title if self.state != READY else "[b]Mock interview[/b]\n[dim]the clock is not running yet[/dim]"
        )
        lines = []
        for i, each in enumerate(interview.plan.parts):
            mark = RATINGS[interview.given[i].rating][0] if i in interview.given else f"{each.minutes:.0f} min"
            now = i == interview.at and self.state in (ASKED, COMPUTING, ANSWERED)
            lines.append(f"{'[b]▶' if now else ' '} {each.name:<11}{mark:>6}{'[/b]' if now else ''}")
        self.query_one("#agenda", Static).update("\n".join(lines))
        self._tick()
        self.refresh_bindings()

    def check_action(self, action: str, parameters: tuple) -> bool | None:
        """Only the keys that do something now are shown."""
        if action == "rate":
            return self.state == ANSWERED and not self._rubric and parameters[0] <= self.best
        if action == "pause":
            return self.state == ASKED
        if action in ("skip", "back"):
            return self.state in (ASKED, COMPUTING, ANSWERED)
        return action != "go_on" or self.state in (READY, ASKED) or (self.state == ANSWERED and bool(self._rubric))

    @property
    def _rubric(self) -> tuple[str, ...]:
        return self.question.rubric if self.question else ()

    # the keys

    @work(exclusive=True)
    async def action_go_on(self) -> None:
        if self.state == READY:
            await self._ask()
        elif self.state == ASKED:
            self._count()
            await self._reveal()
        elif self.state == ANSWERED and self._rubric:
            chosen = set(self.query_one("#rubric", SelectionList).selected)
            met = [number in chosen for number in range(len(self._rubric))]
            self.interview.met[self.interview.at] = met
            await self._rate(from_rubric(met))

    @work(exclusive=True)
    async def action_rate(self, rating: int) -> None:
        await self._rate(rating)

    async def _rate(self, rating: int) -> None:
        self.interview.rate(rating)
        await self._ask()

    @work(exclusive=True)
    async def action_skip(self) -> None:
        self._count()
        self.interview.skip()
        await self._ask()

    @work(exclusive=True)
    async def action_back(self) -> None:
        self._count()
        self.interview.back()
        await self._ask()

    def action_pause(self) -> None:
        self._count()
        self.paused = not self.paused
        self._say("Paused: **p** goes on." if self.paused else "**Enter** when you have answered.")

    def action_finish(self) -> None:
        self._count()
        if self.state == OVER or not self.interview.given:
            self.exit()
        else:
            self.interview.at = len(self.interview.plan.parts)
            self.run_worker(self._ask(), exclusive=True)

    async def _ask(self) -> None:
        """The part where the interview stands, or the end."""
        part, self.question, self.paused, self._since = self.interview.part, None, False, self._now()
        if part is None:
            self.state = OVER
            await self._show("")
            self.query_one("#say", Static).update(closing(self.interview))
            self._frame()
            return
        self.state = ASKED
        if part.task:
            self.sheet = self.interview.sheet(self.sheets)
            await self._show(
                in_terminal(f"**{part.asked or part.task.title}**\n\n{part.task.text}\n\nWrite it in **{self.sheet}** and save.")
            )
            self._say("**Enter** when it is saved: the checks judge it.")
        else:
            text = part.item.asked_at_once or (await self._computed(part.item.id)).question
            await self._show(in_terminal(text if not part.item.how else f"{text}\n\n{part.item.how}"))
            self._say("**Enter** when you have answered.")
        self._since = self._now()
        self.query_one("#body").scroll_home(animate=False)
        self._frame()

    async def _computed(self, name: str) -> Question:
        self._say("computing the numbers of this answer …")
        return await self.run_worker(lambda: self.answers.get(name), thread=True, exit_on_error=False).wait()

    async def _reveal(self) -> None:
        self.state = COMPUTING
        part, at = self.interview.part, self.interview.at
        took = f"You took {clock(self.interview.seconds.get(at, 0))} of {part.minutes:.0f}:00. "
        self.best = max(RATINGS)
        shown = []
        if part.task:
            self._say("judging …")
            wrong = await self.run_worker(lambda: tasks.judged(part.task, self.sheet), thread=True).wait()
            self.best = tasks.best_rating(wrong)
            shown.append("\n".join(f"- ✗ {line}" for line in wrong) or "✓ right")
        if part.item:
            try:
                self.question = await self._computed(part.item.id)
            except Exception as error:  # Textual wraps what a worker raises
                self._say(f"{getattr(error, 'error', error)} **s** goes on.")
                self._frame()
                return
            steps = words.steps(self.question)
            shown += [f"### {name}\n\n{in_terminal(text)}" for name, text in steps if name != words.RUBRIC]
        self.query_one("#answer").remove_class("hidden")
        await self.query_one("#answer", Markdown).update("\n\n".join(shown))
        if self._rubric:
            chooser = self.query_one("#rubric", SelectionList)
            chooser.clear_options()
            chooser.add_options([(in_terminal(line), number) for number, line in enumerate(self._rubric)])
            chooser.highlighted = 0
            chooser.remove_class("hidden")
            chooser.focus()
            self._say(f"{took}**Space** ticks what you said; **Enter** rates it.")
        else:
            allowed = "\n".join(f"- **{number}** {name}: {what}" for number, (name, what) in RATINGS.items() if number <= self.best)
            self._say(f"{took}How was it?\n\n{allowed}")
        self.state = ANSWERED
        self._frame()
