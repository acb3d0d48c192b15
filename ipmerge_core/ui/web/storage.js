// @ts-check
// Runs before every other script. Where the browser refuses storage (a frame of another site with
// site data blocked), merely naming `localStorage` throws, and no component of the page starts.
// There the page's own memory takes its place: what is stored lasts as long as the page.

class PageStorage {
  /** @type {Map<string, string>} */
  #values = new Map();

  get length() {
    return this.#values.size;
  }

  /** @param {number} index */
  key(index) {
    return [...this.#values.keys()][index] ?? null;
  }

  /** @param {string} name */
  getItem(name) {
    return this.#values.get(String(name)) ?? null;
  }

  /** @param {string} name @param {string} value */
  setItem(name, value) {
    this.#values.set(String(name), String(value));
  }

  /** @param {string} name */
  removeItem(name) {
    this.#values.delete(String(name));
  }

  clear() {
    this.#values.clear();
  }
}

for (const name of /** @type {const} */ (["localStorage", "sessionStorage"])) {
  try {
    window[name].getItem("");
  } catch {
    Object.defineProperty(window, name, { configurable: true, value: new PageStorage() });
  }
}
