// Names and roles that Gradio leaves out, set as soon as a tab is mounted: the prompt's text box has
// no accessible name, a message is named by its own markup, and two streaming chats would each be read
// aloud word by word. One status line speaks for both. A message is copied as it was written.
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
    set("#chats [data-testid=user]", { "aria-label": "Question" });
    set("#chats [data-testid=bot]", { "aria-label": "Answer" });
    // What KaTeX cannot set, or sets in red as unknown, is shown as it was written.
    for (const failed of document.querySelectorAll("#chats .formula:has(.katex-error, mstyle[mathcolor='#cc0000'])")) {
      failed.textContent = failed.title;
    }
    set("#analyse-open", { "aria-expanded": String(Boolean(document.querySelector("#analyse-panel"))), "aria-controls": "analyse-panel" });
  };
  // Gradio's copy buttons take the markup of messages; each message carries its text in a field.
  const asWritten = (text) => {
    if (!text.includes('<div class="written">')) return text;
    const { body } = new DOMParser().parseFromString(text, "text/html");
    for (const message of body.querySelectorAll(".written")) message.replaceWith(message.querySelector("input").value);
    return body.textContent;
  };
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(asWritten(text));
  }
  document.addEventListener("copy", (event) => { // where there is no clipboard, Gradio copies from a text area
    const { target } = event;
    if (!(target instanceof HTMLTextAreaElement) || asWritten(target.value) === target.value) return;
    event.clipboardData.setData("text/plain", asWritten(target.value));
    event.preventDefault();
  });
  let waiting = false;
  new MutationObserver(() => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; repair(); });
  }).observe(document.body, { childList: true, subtree: true });
  repair();
}
