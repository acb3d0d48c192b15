// @ts-check
// The tab of the app in which the models answer.

/** The button of the tab, where there is one. */
export function tryTab() {
  return document.getElementById("tab-try-button");
}
