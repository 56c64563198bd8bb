// Typeset what the arithmatex extension marks as mathematics, and nothing else.
window.MathJax = {
  tex: {
    inlineMath: [["\\(", "\\)"]],
    displayMath: [["\\[", "\\]"]],
    processEscapes: true,
    processEnvironments: true,
  },
  options: {
    // It would load what the site does not have.
    enableMenu: false,
    ignoreHtmlClass: ".*|",
    processHtmlClass: "arithmatex",
  },
  startup: {
    pageReady: () => MathJax.startup.defaultPageReady().then(markWide),
  },
};

// Lines are not broken in formulas. One that is wider than its paragraph has a bar.
function markWide() {
  for (const formula of document.querySelectorAll("span.arithmatex")) {
    const room = formula.parentElement.clientWidth;
    formula.classList.toggle("is-wide", room > 0 && formula.offsetWidth > room);
  }
}
