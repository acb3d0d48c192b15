// Names and roles that Gradio leaves out, set as soon as a tab is mounted: the prompt's text box has
// no accessible name, and two streaming chats would each be read aloud word by word. One status line
// speaks for both.
() => {
  const set = (selector, attributes) => {
    for (const found of document.querySelectorAll(selector)) {
      for (const [name, value] of Object.entries(attributes)) {
        if (found.getAttribute(name) !== value) found.setAttribute(name, value);
      }
    }
  };
  const repair = () => {
    set("#prompt textarea", { "aria-label": "Question" });
    set("#chat-base [role=log]", { "aria-live": "off", "aria-label": "Answers of the left model" });
    set("#chat-merged [role=log]", { "aria-live": "off", "aria-label": "Answers of the right model" });
    set("#answers-status, #run-status, #analyse-status, #start-note", { role: "status", "aria-live": "polite" });
    set("#analyse-open", { "aria-expanded": String(Boolean(document.querySelector("#analyse-panel"))), "aria-controls": "analyse-panel" });
  };
  let waiting = false;
  new MutationObserver(() => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; repair(); });
  }).observe(document.body, { childList: true, subtree: true });
  repair();
}
