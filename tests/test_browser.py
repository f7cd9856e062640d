"""The page in a real browser: at two widths, light and dark, it draws, opens and asks for nothing else."""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest
from scored import Row, demo, score
from test_gallery import FLOW, Flow

from avrl import report
from avrl.cache import Cache
from avrl.stage import run

pytestmark = pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here: the page is not seen")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of the demo's scores, with a second gap beside them."""
    cache, out = Cache(tmp_path_factory.mktemp("cache")), tmp_path_factory.mktemp("report")
    scores, checkpoints = demo(cache)
    scores += score(cache, Row(fingerprint="b" * 12, gap=5))
    scores += [run(FLOW, Flow(encoder=name), {}, cache)[0] for name in ("dinov2", "clip")]
    report.write(out, scores, checkpoints, 200)
    return out / "report.html"


# What a probe beside the page finds in it: layout, figures, contrast, and where a number leads.
PROBE = """<!doctype html><title>waiting</title><iframe src="report.html" style="border:0;width:{width}px;height:900px">
</iframe><script>
const light = c => {{ const [r, g, b] = c.match(/[\\d.]+/g).map(Number); return (.3 * r + .59 * g + .11 * b) / 255; }};
window.onload = () => {{
  const page = document.querySelector("iframe").contentDocument, win = page.defaultView, said = {{}};
  const style = one => win.getComputedStyle(one), paper = light(style(page.body).backgroundColor);
  const seen = one => one.getBoundingClientRect().width > 150 && one.getBoundingClientRect().height > 60;
  said.wide = page.documentElement.scrollWidth <= {width};
  said.figures = page.querySelectorAll("figure").length;
  const drawn = f => [...f.querySelectorAll("svg, img")].some(seen);
  said.hidden = [...page.querySelectorAll("figure")].filter(f => !drawn(f)).map(f => f.ariaLabel);
  said.dark = paper < .5;
  const texts = [...page.querySelectorAll("svg text, td, th, p, li, dd")].filter(one => one.getClientRects().length);
  const onShade = one => ["rgb(255, 255, 255)", "rgb(16, 16, 16)"].includes(one.ownerSVGElement && style(one).fill);
  said.faint = texts.filter(one => !onShade(one))  // numbers of the heat map stand on its cells, not on the paper
    .filter(one => Math.abs(light(one.ownerSVGElement ? style(one).fill : style(one).color) - paper) < .3)
    .map(one => one.textContent.slice(0, 30)).slice(0, 3);
  const link = page.querySelector("#winners ~ .box td a");
  link.click();
  setTimeout(() => {{
    const place = page.querySelector(win.location.hash);
    said.opened = place.closest("details").open && place.getBoundingClientRect().height > 50;
    document.title = JSON.stringify(said);
  }}, 200);
}};
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and remembers what was asked for."""

    def log_message(self, form, *args):
        self.server.asked.append(self.path)


@pytest.fixture(scope="module")
def served(page):
    """The folder of the report on loopback, and the requests that came."""
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(page.parent))
    ) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_it_without_complaint_or_request(page, served, tmp_path, width, scheme):
    (page.parent / "probe.html").write_text(PROBE.format(width=width), encoding="utf-8")
    served.asked.clear()
    command = "chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom"
    command += " --disable-background-networking --disable-component-update --disable-sync --enable-logging=stderr"
    command += f" --virtual-time-budget=4000 --blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    address = f"http://127.0.0.1:{served.server_port}/probe.html"
    options = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", address]
    done = subprocess.run([*command.split(), *options], capture_output=True, text=True, timeout=120, check=True)
    said = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    assert said.pop("figures") > 6
    assert said == {"wide": True, "hidden": [], "dark": scheme == "dark", "faint": [], "opened": True}
    assert set(served.asked) <= {"/probe.html", "/report.html", "/favicon.ico"}
    assert "CONSOLE" not in done.stderr.replace("favicon", "")
