// SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
// SPDX-License-Identifier: Apache-2.0
// Only what the Markdown extension has marked as an equation is typeset.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], processEscapes: true },
  options: { ignoreHtmlClass: ".*", processHtmlClass: "arithmatex", enableMenu: false },
};
