"""The page under load: time to the first visible text and to the full answer in a browser, ten visitors at once, memory.

    python benchmarks/demo/visits.py --output benchmarks/results/demo.json

Serves the page in a process of its own on two threads of a CPU. Seconds in a browser are those between the click and the text
on the page. Needs chromium and chromedriver. Other work on the machine makes every number worse: its load is recorded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gradio_client import Client

sys.path.insert(0, str(Path(__file__).parents[1]))

from readme import inserted, markers

from clear_adapters.cli_options import ADAPTER
from clear_adapters.results import ResultFile, read_result
from clear_adapters.ui.samples import draw_sample

THREADS = 2
FIRST = 1000
"""Samples from here on are asked about: none of the gallery, so that nothing is answered from memory."""
QUESTION = "Read me what is written on the sign."
"""None of those whose answers are kept."""
MARKERS = markers("demo")
README = Path(__file__).parents[1] / "README.md"

CLOCK = """
window.times = {};
const note = (name, here) => { if (here && !(name in window.times)) window.times[name] = performance.now(); };
const text = id => document.getElementById(id)?.innerText ?? '';
new MutationObserver(() => {
  note('base_first', document.querySelector('#base .answer strong'));
  note('base_full', document.querySelector('#base .took'));
  note('clear_first', /“/.test(text('before')));
  note('restored', document.querySelector('#restoration img'));
  note('clear_full', document.querySelector('#after .took'));
  note('verdict', document.querySelector('#verdict section'));
}).observe(document.body, {subtree: true, childList: true, characterData: true});
document.getElementById('ask').addEventListener('click', () => { window.times = {click: performance.now()}; }, true);
"""


def serve(port: int, folder: str) -> subprocess.Popen[bytes]:
    """The page in a process of its own."""
    code = (
        f"import torch; torch.set_num_threads({THREADS})\n"
        "from clear_adapters.ui import build_demo, launch\n"
        f"launch(build_demo(device='cpu'), server_port={port}, quiet=True)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "GRADIO_TEMP_DIR": folder}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    while process.poll() is None:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.2)
    raise SystemExit("the page did not start")


def resident(process: subprocess.Popen[bytes]) -> float:
    """Megabytes of memory that a process holds."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def ask(client: Client, index: int, restore: str = "auto") -> float:
    """Chooses a sample and asks its question; seconds until the last word."""
    client.predict(index, api_name="/choose")
    began = time.perf_counter()
    question = draw_sample(index).suggestions[0].text
    job = client.submit(question, restore, "", ADAPTER, 0, 0, 0, api_name="/ask")
    job.result()
    told = [o[7] for o in job.outputs() if isinstance(o[7], dict) and "question" in o[7]]
    assert told, f"no answer about sample {index}"
    assert told[-1]["question"] == question
    return time.perf_counter() - began


def in_browser(address: str, repeats: int) -> dict[str, float]:
    """Medians of seconds from the click to what is seen, about the first example, which is restored."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    options.page_load_strategy = "eager"
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    found: dict[str, list[float]] = {}
    try:
        wait = WebDriverWait(driver, 120, 0.05)
        for _ in range(repeats):
            began = time.perf_counter()
            driver.get(address)
            wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "#gallery button img"))
            wait.until(lambda d: d.find_elements(By.ID, "ask"))
            found.setdefault("page", []).append(time.perf_counter() - began)
            driver.execute_script(CLOCK)
            field = driver.find_element(By.CSS_SELECTOR, "#question textarea")
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(Keys.DELETE, QUESTION)
            driver.find_element(By.ID, "ask").click()
            wait.until(
                lambda d: d.execute_script("return 'verdict' in window.times && 'click' in window.times")
            )
            times = driver.execute_script("return window.times")
            for name, at in times.items():
                if name != "click":
                    found.setdefault(name, []).append((at - times["click"]) / 1000)
    finally:
        driver.quit()
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def measure(repeats: int, users: int, questions: int) -> dict[str, Any]:
    """Everything, with one server."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        load = [round(x, 2) for x in os.getloadavg()]
        process = serve(port, folder)
        try:
            address = f"http://127.0.0.1:{port}/"
            client = Client(address, verbose=False)
            began = time.perf_counter()
            ask(client, FIRST)
            first = time.perf_counter() - began
            browser = in_browser(address, repeats)
            clients = [Client(address, verbose=False) for _ in range(users)]
            began = time.perf_counter()
            with ThreadPoolExecutor(users) as pool:
                waited = sorted(pool.map(ask, clients, range(FIRST + 1, FIRST + 1 + users)))
            together = time.perf_counter() - began
            memory = {"0": round(resident(process), 1)}
            seconds = []
            for number in range(questions):
                seconds.append(ask(clients[number % users], FIRST + 100 + number))
                if (number + 1) % max(1, questions // 4) == 0:
                    memory[str(number + 1)] = round(resident(process), 1)
                    print(number + 1, memory, file=sys.stderr)
            left = sum(1 for p in Path(folder).rglob("*") if p.is_file())
        finally:
            process.terminate()
            process.wait()
    return {
        "threads": THREADS,
        "cores": os.cpu_count(),
        "load_before": load,
        "first_question_seconds": round(first, 2),
        "browser_seconds": browser,
        "repeats": repeats,
        "users": {
            "n": users,
            "seconds_all": round(together, 1),
            "answered": len(waited),
            "waited": [round(w, 1) for w in waited],
        },
        "memory": {"questions": questions, "megabytes": memory},
        "question_seconds": {
            "median": round(statistics.median(seconds), 2),
            "longest": round(max(seconds), 2),
        },
        "files_left": left,
    }


def render(result: ResultFile) -> str:
    """What stands in the README."""
    p = result.payload
    b, u, m = p["browser_seconds"], p["users"], p["memory"]
    rows = [
        ("page loaded", f"{b['page']:.1f} s"),
        ("click to the first text of the plain model", f"{b['base_first']:.1f} s"),
        ("click to the first text of CLEAR", f"{b['clear_first']:.1f} s"),
        ("click to the restored picture", f"{b['restored']:.1f} s"),
        ("click to the full answer, restored", f"{b['clear_full']:.1f} s"),
        ("the first question of all, which loads the model", f"{p['first_question_seconds']:.1f} s"),
        (f"{u['n']} visitors at once: answered", f"{u['answered']} in {u['seconds_all']:.0f} s"),
        ("their waits, shortest and longest", f"{u['waited'][0]:.1f} to {u['waited'][-1]:.1f} s"),
        *(
            (f"memory after {n} more questions", f"{m['megabytes'][n]:.0f} MB")
            for n in sorted(m["megabytes"], key=int)
        ),
        ("files left behind", str(p["files_left"])),
    ]
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    note = f"{result.device}, {result.date[:10]}; load of the machine before: {p['load_before'][0]:.1f}; medians of {p['repeats']}."
    return f"{note}\n\n| | |\n| --- | ---: |\n{lines}"


def write_readme(result: ResultFile) -> None:
    """Puts the table between its markers."""
    text = README.read_text(encoding="utf-8")
    README.write_text(inserted(text, render(result), str(README), MARKERS), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo.json"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--users", type=int, default=10)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--readme", action="store_true", help="put the table into benchmarks/README.md")
    args = parser.parse_args()
    payload = measure(args.repeats, args.users, args.questions)
    device = f"CPU, {os.cpu_count()} cores, {THREADS} threads, float32"
    ResultFile.collect("demo", payload, device=device, seeds=[0], packages=["gradio"]).write(args.output)
    result = read_result(args.output)
    print(render(result))
    if args.readme:
        write_readme(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
