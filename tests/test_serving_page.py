"""The page of the service in headless Chromium: a key, an image that is dropped, and its scores under two adapters."""

import base64
import html
import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="FastAPI, of the extra serve, is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn, of the extra serve, is not installed")
from test_serving_app import alone, load_test

from efft_kernels.serving import api

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = "0123456789abcdef"
USER = """<script>(async () => {
  const until = async (what) => { while (!what()) await new Promise(go => setTimeout(go, 20)); };
  await until(() => !$("key-card").hidden);
  $("key").value = KEY; $("key").dispatchEvent(new Event("change"));
  await until(() => document.querySelector("#adapters input"));
  for (const box of document.querySelectorAll("#adapters input")) if (!box.checked) box.click();
  const data = new DataTransfer(), bytes = Uint8Array.from(atob(IMAGE), c => c.charCodeAt(0));
  data.items.add(new File([bytes], "cat.png", {type: "image/png"}));
  document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, cancelable: true}));
  await until(() => document.querySelectorAll("#results .card:not(.waiting)").length === 3);
  const cards = [...document.querySelectorAll("#results .card")].map(card => [card.querySelector("h2").textContent,
    [...card.querySelectorAll(".row")].map(row => [...row.querySelectorAll("span")].map(one => one.textContent))]);
  const box = one => $(one).getBoundingClientRect();
  document.title = JSON.stringify({cards, width: document.documentElement.scrollWidth, room: innerWidth,
    picture: box("picture").height, below: box("results").top > box("adapters").bottom});
})()</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_an_image_is_dropped_on_the_page(tmp_path, monkeypatch):
    settings, image = load_test.make_adapters(tmp_path, [3, 4]), load_test.pictures(1)[0]
    Path(settings.adapters, "adapter-0.labels.txt").write_text("<b>ant</b>\nbee\ncat")
    (tmp_path / "keys").write_text(KEY)
    user = USER.replace("KEY", json.dumps(KEY)).replace("IMAGE", json.dumps(base64.b64encode(image).decode()))
    (tmp_path / "index.html").write_text((api._PAGES / "index.html").read_text() + user)
    monkeypatch.setattr(api, "_PAGES", tmp_path)
    replica, answers = alone(settings.model_copy(update={"key_file": str(tmp_path / "keys")}), monkeypatch), {}
    answer = replica.classifier.answer
    replica.classifier.answer = lambda one, scores: answers.setdefault(one.upload.adapter, answer(one, scores))
    server = uvicorn.Server(uvicorn.Config(api.build(lambda: replica), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        for width in (1280, 500):
            options = f"--headless --no-sandbox --disable-gpu --virtual-time-budget=60000 --window-size={width},900"
            command = [CHROMIUM, "--dump-dom", *options.split(), f"--user-data-dir={tmp_path}/{width}"]
            shown = subprocess.run([*command, f"http://127.0.0.1:{port}"], capture_output=True, text=True, timeout=120)
            found = json.loads(html.unescape(re.search("<title>(.*?)</title>", shown.stdout)[1]))
            assert [name for name, _ in found["cards"]] == ["Without an adapter", "adapter-0", "adapter-1"]
            assert len(answers) == 3
            for name, rows in found["cards"]:
                scores = answers.pop(None if name == "Without an adapter" else name)["scores"]
                labels = [one["label"] if name == "adapter-0" else f"class {one['index']}" for one in scores]
                assert rows == [[label, f"{100 * one['score']:.1f} %"] for label, one in zip(labels, scores)]
            assert found["width"] <= found["room"] and found["picture"] > 50 and found["below"] == (width < 720)
    finally:
        server.should_exit = True
        thread.join()
