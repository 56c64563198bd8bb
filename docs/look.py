"""Looks at the built site in a browser: takes pictures of all pages, light and dark,
wide and narrow, and fails on what a reader would stumble over.

    pip install playwright
    mkdocs build --strict
    python docs/look.py site pictures

The browser is the one called `chromium`, or else that of `playwright install chromium`.
Errors are TeX that is not typeset, text that sticks out, links into the site that lead
nowhere, and requests to anything but the site.
"""

import argparse
import functools
import http.server
import shutil
import sys
import threading
import urllib.parse
from pathlib import Path

from playwright.sync_api import Page, sync_playwright


widths = {"wide": 1280, "narrow": 400}
schemes = ["light", "dark"]

# Of the article, without code.
find_tex = r"""() => {
  const article = document.querySelector("article").cloneNode(true);
  article.querySelectorAll("code, pre, mjx-container").forEach(x => x.remove());
  const raw = article.textContent.match(/\\[a-zA-Z([]|\$[^$]+\$/g) || [];
  const wrong = document.querySelectorAll("mjx-merror").length;
  return [...raw, ...Array(wrong).fill("an error of MathJax")];
}"""

# What sticks out on the right, without a bar to scroll it by.
find_overflow = """() => {
  const root = document.documentElement, right = root.clientWidth + 1, found = [];
  if (root.scrollWidth > root.clientWidth) found.push("the page");
  const scrolls = x => x.tagName != "BODY" &&
      (getComputedStyle(x).overflowX != "visible" || scrolls(x.parentElement));
  const article = document.querySelector("article"), range = document.createRange();
  const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode, parent = text.parentElement;
    range.selectNodeContents(text);
    if (parent.closest("mjx-assistive-mml") || scrolls(parent)) continue;
    if (range.getBoundingClientRect().right > right)
      found.push(text.textContent.trim().slice(0, 60));
  }
  for (const x of article.querySelectorAll("img, mjx-math"))
    if (x.getBoundingClientRect().right > right && !scrolls(x))
      found.push(x.tagName + " " + x.textContent);
  return found;
}"""

find_links = """() => [
  [...document.querySelectorAll("[id]")].map(x => x.id),
  [...document.querySelectorAll("a[href]")].map(x => x.href),
]"""


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def look(page: Page, url: str, picture: Path) -> list[str]:
    page.goto(url, wait_until="load")
    page.evaluate("() => window.MathJax && MathJax.startup.promise")
    page.screenshot(path=picture, full_page=True)
    tex = [f"raw TeX: {x}" for x in page.evaluate(find_tex)]
    return tex + [f"sticks out: {x}" for x in page.evaluate(find_overflow)]


def broken_links(links: dict[str, tuple[list[str], list[str]]]) -> list[str]:
    errors = []
    roots = {urllib.parse.urlsplit(url).netloc for url in links}
    for url, (_, targets) in links.items():
        for target in targets:
            parts = urllib.parse.urlsplit(target)
            place = parts._replace(fragment="", query="").geturl()
            anchor = urllib.parse.unquote(parts.fragment)
            if parts.netloc not in roots:
                continue
            if place not in links:
                errors.append(f"{url}: no page {place}")
            elif anchor and anchor not in links[place][0]:
                errors.append(f"{url}: no anchor {target}")
    return sorted(set(errors))


def main(site: Path, out: Path) -> int:
    handler = functools.partial(Handler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}/"
    names = [x.parent.relative_to(site) for x in sorted(site.rglob("index.html"))]
    out.mkdir(parents=True, exist_ok=True)
    errors, links = [], {}

    def only_site(route, request):
        if request.url.startswith(root):
            return route.continue_()
        errors.append(f"{request.frame.url}: asks for {request.url}")
        return route.abort()

    with sync_playwright() as playwright:
        # Without its sandbox, it starts in containers too.
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"]
        )
        for width, pixels in widths.items():
            for scheme in schemes:
                view = {"width": pixels, "height": 900}
                page = browser.new_page(viewport=view, color_scheme=scheme)
                page.route("**/*", only_site)
                for name in names:
                    url = root if name == Path() else f"{root}{name.as_posix()}/"
                    stem = "_".join(name.parts) or "index"
                    found = look(page, url, out / f"{stem}_{width}_{scheme}.png")
                    if scheme == "light":  # the same in the dark
                        errors += [f"{url}, {width}: {x}" for x in found]
                    links[url] = page.evaluate(find_links)
                page.close()
        browser.close()
    errors = [*dict.fromkeys(errors), *broken_links(links)]
    for error in errors:
        print(error.replace(root, "/"), file=sys.stderr)
    print(f"{len(names)} pages, {len(errors)} errors, pictures in {out}")
    return 1 if errors else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("site", type=Path, nargs="?", default="site")
    parser.add_argument("out", type=Path, nargs="?", default="pictures")
    sys.exit(main(**vars(parser.parse_args())))
