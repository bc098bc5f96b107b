"""MLflow's page in a real browser: who sees it, what one does there, and what other pages may do to it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterator

import pytest
from browser import Watch, chromium, neighbour, picture
from journey import ROOT, Site
from playwright.sync_api import Browser, Error, Page, expect

pytestmark = pytest.mark.xdist_group("quickstart")
PICTURES = ROOT / "test-output" / "page"
SAID = "naïve – ça va\n" * 50
# Questions of MLflow's page to which 404 is the answer: is there a login app of MLflow's own, is this name taken?
EXPECTED = re.compile(r"404 GET https://[^/]+/ajax-api/2\.0/mlflow/(users/current|experiments/get-by-name\?\S+)")
RUNS = """
import json
import mlflow
made = {"experiment": mlflow.set_experiment(NAME).experiment_id, "runs": {}}
for name, accuracy in (("shallow", 0.5), ("deep", 0.875)):
    with mlflow.start_run(run_name=name) as run:
        mlflow.log_param("layers", len(name))
        mlflow.log_metric("accuracy", accuracy)
        mlflow.log_text(SAID, "notes/said.txt")
    made["runs"][name] = run.info.run_id
print("made", json.dumps(made))
"""
# A request that a browser sends without asking first, with the login of whoever looks at the page.
FORGED = """url => fetch(url, {
    method: "POST", mode: "no-cors", credentials: "include",
    headers: {"Content-Type": "text/plain"}, body: JSON.stringify({name: "forged"}),
}).then(() => "sent", String)"""


@dataclasses.dataclass
class Made:
    """What the client logged for the page to show."""

    name: str
    experiment: str
    runs: dict[str, str]


@pytest.fixture(scope="module")
def site(quickstart: tuple[Site, str]) -> Site:
    """The quickstart's site, and an empty folder for the pictures."""
    shutil.rmtree(PICTURES, ignore_errors=True)
    return quickstart[0]


@pytest.fixture(scope="module")
def made(site: Site) -> Made:
    """An experiment with two runs, each with a parameter, a metric and an artifact, logged by MLflow's client."""
    name = f"page {uuid.uuid4().hex[:8]}"
    out = site.python(f"NAME, SAID = {name!r}, {SAID!r}\n{RUNS}")
    content = next(json.loads(line.removeprefix("made ")) for line in out.splitlines() if line.startswith("made "))
    return Made(name=name, **content)


@pytest.fixture(scope="module")
def portal(site: Site) -> Iterator[tuple[str, pathlib.Path]]:
    """A page of another origin, with MLflow's page in a frame, and its certificate.

    It is of the same site as browsers understand it (a host below it), since to pages of other sites they do not
    lend the user's login, nor ask for it: such pages fail with 401 whatever the server says of frames and origins.
    """
    frame = f"<p>a portal</p><iframe src='https://{site.name}/' width='900' height='600'></iframe>"
    with neighbour(f"portal.{site.name}", frame) as served:
        yield served


@pytest.fixture(scope="module")
def browser(site: Site, portal: tuple[str, pathlib.Path]) -> Iterator[Browser]:
    """A browser that trusts the authority which the quickstart left as ca.crt, and the portal."""
    with chromium([site.checkout / "ca.crt", portal[1]], [f"portal.{site.name}"]) as started:
        yield started


@dataclasses.dataclass
class Window:
    """A window of somebody who is logged in, and what went wrong in it."""

    page: Page
    watch: Watch
    keep: Callable[[str], None]

    def wrong(self) -> list[str]:
        """All that the developer tools show in red once the page is at rest, but the questions that 404 answers."""
        self.watch.rest(self.page)
        answers = [answer for answer in self.watch.answers if not EXPECTED.fullmatch(answer)]
        return [*answers, *self.watch.failures, *self.watch.console, *self.watch.exceptions]


def open_window(site: Site, browser: Browser, password: str | None) -> Window:
    """A new window with nothing remembered, whose user answers the login prompt; None closes the prompt."""
    credentials = {"username": "mlflow", "password": password, "origin": f"https://{site.name}"}
    context = browser.new_context(
        http_credentials=credentials if password else None,  # type: ignore[arg-type]
        base_url=f"https://{site.name}",
        viewport={"width": 1400, "height": 900},
    )
    # A cold server on a busy machine takes its time for the first answers.
    context.set_default_timeout(60_000)
    watch = Watch()
    watch.over(context)
    page = context.new_page()
    return Window(page, watch, lambda name: picture(page, PICTURES / f"{name}.png"))


@pytest.fixture
def window(site: Site, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Window]:
    """A window with the right password; its last state is kept as a picture."""
    opened = open_window(site, browser, site.secrets()["vault_gateway_password"])
    yield opened
    opened.keep(f"{request.node.name}-end")
    opened.page.context.close()


def list_of_runs(page: Page, made: Made) -> None:
    """From the front door to the runs of the client's experiment, by clicks."""
    page.goto("/")
    page.get_by_role("link", name="Experiments").first.click()
    page.get_by_role("button", name="Model training").click()
    page.get_by_test_id("experiment-list-item-link").get_by_text(made.name, exact=True).click()
    for name in made.runs:
        page.get_by_role("link", name=name, exact=True).wait_for()


def test_a_browser_without_the_authority_turns_back(site: Site) -> None:
    """So that the other tests show that the certificate is good, not that nobody looks."""
    with chromium() as browser, pytest.raises(Error, match="ERR_CERT_AUTHORITY_INVALID"):
        browser.new_page().goto(f"https://{site.name}/")


def test_a_wrong_password_opens_nothing(site: Site, browser: Browser) -> None:
    """The answer is a bare 401 without a word of MLflow."""
    opened = open_window(site, browser, "wrong")
    answer = opened.page.goto("/")
    opened.keep("wrong-password")
    assert answer and answer.status == 401
    expect(opened.page.locator("body")).to_contain_text("401")
    assert "mlflow" not in opened.page.content().lower()
    assert opened.watch.answers == [f"401 GET https://{site.name}/"]
    opened.page.context.close()


def test_nor_does_no_password(site: Site, browser: Browser) -> None:
    """Closing the prompt leads nowhere."""
    opened = open_window(site, browser, None)
    with pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"):
        opened.page.goto("/")
    assert opened.watch.answers == [f"401 GET https://{site.name}/"]
    opened.page.context.close()


def test_it_opens_and_stays_at_home(site: Site, window: Window, made: Made) -> None:
    """The page lists the experiments, and asks nothing of any other host: it works where there is no internet."""
    answer = window.page.goto("/")
    assert answer and answer.status == 200
    window.page.get_by_role("link", name="Experiments").first.click()
    window.page.get_by_test_id("experiment-list-item-link").get_by_text(made.name, exact=True).wait_for()
    window.keep("experiments")
    assert window.watch.hosts == {site.name}
    assert window.wrong() == []


def test_an_experiment_is_created(site: Site, window: Window) -> None:
    """By the page's form, and the API has it."""
    name = f"made in the page {uuid.uuid4().hex[:8]}"
    window.page.goto("/#/experiments")
    window.page.get_by_test_id("create-experiment-button").click()
    form = window.page.get_by_role("dialog")
    form.get_by_label("Experiment Name").fill(name)
    window.keep("create-experiment")
    form.get_by_role("button", name="Create").click()
    window.page.wait_for_url(re.compile(r"#/experiments/\d+"))
    window.page.get_by_test_id("experiment-link").filter(has_text=name).first.wait_for()
    window.watch.rest(window.page)
    window.keep("experiment-created")
    identity = re.findall(r"#/experiments/(\d+)", window.page.url)
    assert (
        site.python(f"import mlflow; print(mlflow.get_experiment_by_name({name!r}).experiment_id)").split() == identity
    )
    assert window.wrong() == []


def test_a_run_is_opened(window: Window, made: Made) -> None:
    """With its parameter and its metric."""
    list_of_runs(window.page, made)
    window.keep("runs")
    window.page.get_by_role("link", name="deep", exact=True).click()
    window.page.wait_for_url(re.compile(made.runs["deep"]))
    window.page.get_by_role("heading", name="deep").wait_for()
    for name, value in (("layers", "4"), ("accuracy", "0.875")):
        row = window.page.get_by_role("row").filter(has=window.page.get_by_text(name, exact=True))
        expect(row.get_by_text(value, exact=True)).to_be_visible()
    window.keep("run")
    assert window.wrong() == []


def test_two_runs_are_compared(window: Window, made: Made) -> None:
    """Side by side, with both values of the metric, and drawn."""
    list_of_runs(window.page, made)
    for run in made.runs.values():
        window.page.locator(f"[row-id='{run}'] .ag-selection-checkbox input").check()
    window.page.get_by_test_id("runs-compare-button").click()
    window.page.get_by_role("heading", name="Comparing 2 Runs").wait_for()
    for value in ("0.5", "0.875"):
        expect(window.page.get_by_role("grid").get_by_text(value, exact=True)).to_be_visible()
    expect(window.page.locator("svg.main-svg").first).to_be_visible()
    window.keep("compare")
    assert window.wrong() == []


def test_a_run_is_renamed(site: Site, window: Window, made: Made) -> None:
    """By its menu, and the API has the new name."""
    run = made.runs["shallow"]
    window.page.goto(f"/#/experiments/{made.experiment}/runs/{run}")
    window.page.get_by_role("heading", name="shallow").wait_for()
    window.page.get_by_test_id("overflow-menu-trigger").click()
    window.page.get_by_test_id("overflow-rename-button").click()
    form = window.page.get_by_role("dialog")
    form.get_by_test_id("rename-modal-input").fill("wide")
    window.keep("rename")
    form.get_by_role("button", name="Save").click()
    window.page.get_by_role("heading", name="wide").wait_for()
    window.keep("renamed")
    assert site.python(f"import mlflow; print(mlflow.get_run({run!r}).info.run_name)").strip() == "wide"
    assert window.wrong() == []


def test_an_artifact_is_shown_and_saved(window: Window, made: Made, tmp_path: pathlib.Path) -> None:
    """The preview shows it, and the saved file has the bytes that the client logged."""
    window.page.goto(f"/#/experiments/{made.experiment}/runs/{made.runs['deep']}/artifacts")
    for name in ("notes", "said.txt"):
        window.page.get_by_test_id("artifact-tree-node").get_by_text(name, exact=True).click()
    window.page.get_by_role("heading", name="notes/said.txt").or_(
        window.page.get_by_text("notes/said.txt")
    ).first.wait_for()
    window.page.get_by_text("naïve – ça va").first.wait_for()
    window.keep("artifact")
    with window.page.expect_download() as saved:
        # The button has no name; its component is called after its source file and line.
        window.page.locator("button[data-component-id*='artifactview.tsx']").first.click()
    assert saved.value.suggested_filename == "said.txt"
    saved.value.save_as(tmp_path / "said.txt")
    assert (tmp_path / "said.txt").read_bytes() == SAID.encode()
    assert window.wrong() == []


def test_another_origin_may_not_frame_it(site: Site, window: Window, portal: tuple[str, pathlib.Path]) -> None:
    """The browser refuses by what the server says of frames, though the user is logged in; a frame at home is shown."""
    window.page.goto("/")
    window.page.get_by_role("link", name="Experiments").first.wait_for()
    window.page.evaluate("() => document.body.append(Object.assign(document.createElement('iframe'), {src: '/'}))")
    window.page.frame_locator("iframe").get_by_role("link", name="Experiments").first.wait_for(state="attached")
    assert window.wrong() == []
    with window.page.expect_console_message(
        lambda message: f"https://{site.name}" in message.text, timeout=20_000
    ) as refusal:
        window.page.goto(portal[0])
    assert re.search(r"X-Frame-Options|frame-ancestors", refusal.value.text), refusal.value.text
    window.keep("framed-by-the-portal")
    assert [frame.url for frame in window.page.frames] == [portal[0], "chrome-error://chromewebdata/"]


def test_an_origin_that_is_named_may_frame_it(site: Site, window: Window, portal: tuple[str, pathlib.Path]) -> None:
    """One variable lets the portal show the page, with what its visitor may see."""
    chosen = {"gateway_frame_ancestors": [portal[0].rstrip("/")]}
    site.playbook("playbooks/gateway.yml", "-e", json.dumps(chosen))
    try:
        window.page.goto("/")
        window.page.get_by_role("link", name="Experiments").first.wait_for()
        window.page.goto(portal[0])
        window.page.frame_locator("iframe").get_by_role("link", name="Experiments").first.wait_for()
        window.keep("framed-by-a-named-portal")
    finally:
        site.playbook("playbooks/gateway.yml")


def test_another_origin_may_not_write(site: Site, window: Window, portal: tuple[str, pathlib.Path]) -> None:
    """A page elsewhere sends a write with the login of its visitor: the server knows it, and refuses for its origin."""
    target = f"https://{site.name}/ajax-api/2.0/mlflow/experiments/create"
    window.page.goto("/")
    window.page.get_by_role("link", name="Experiments").first.wait_for()
    window.page.goto(portal[0])
    with window.page.expect_response(target) as answer:
        assert window.page.evaluate(FORGED, target) == "sent"
    assert answer.value.status == 403
    assert site.python("import mlflow; print(mlflow.get_experiment_by_name('forged'))").strip() == "None"
