// A report of a run that goes on: loads itself again, and looks as it did. Not while a clip plays or a control is in use.
(() => {
  "use strict";

  const seconds = Number(document.querySelector("[data-refresh]").dataset.refresh);
  const key = `omninft-live:${location.pathname}`;
  const folds = () => [...document.querySelectorAll("details")];
  const kept = (() => {
    try { return JSON.parse(sessionStorage.getItem(key)); } catch { return null; }
  })();
  if (kept) {
    folds().forEach((fold, i) => { fold.open = Boolean(kept.open[i]); });
    window.scrollTo({ top: kept.top, behavior: "instant" });
  }

  const isInUse = () =>
    [...document.querySelectorAll("video")].some((video) => !video.paused)
    || Boolean(document.activeElement?.closest("input, select, video"))
    || !(getSelection()?.isCollapsed ?? true);

  setInterval(() => {
    if (document.hidden || isInUse()) return;
    try {
      sessionStorage.setItem(key, JSON.stringify({ top: window.scrollY, open: folds().map((fold) => fold.open) }));
    } catch { /* the page then starts at its top */ }
    location.reload();
  }, 1000 * seconds);
})();
