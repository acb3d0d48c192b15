// Layer map, the permalink: ?v=1&pack=..&s=..&l=..&m=..&u=..&o=..&c=.. in at most 300
// characters. `o` packs the cells set by hand, five to a byte, so that any number of them fits.
// Nothing in a link is believed: unusable values take their defaults, and the page says so.

const LINK_VERSION = "1";
const LINK_KEYS = ["v", "pack", "s", "l", "m", "u", "o", "c"];
const BY_HAND = ["", "merge", "keep"];

function packOverrides(index, overrides) {
  const digits = index.cells.map((cell) => BY_HAND.indexOf(overrides[cell.name] || ""));
  while (digits.length && digits[digits.length - 1] === 0) digits.pop();
  const bytesOut = [];
  for (let at = 0; at < digits.length; at += 5) {
    bytesOut.push(digits.slice(at, at + 5).reduceRight((sum, digit) => 3 * sum + digit, 0));
  }
  return btoa(String.fromCharCode(...bytesOut)).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
}

function unpackOverrides(index, text, problems) {
  const overrides = {};
  if (!text) return overrides;
  if (!/^[A-Za-z0-9_-]{1,400}$/.test(text) || text.length % 4 === 1) { problems.push("o is damaged"); return overrides; }
  const values = [...atob(text.replace(/-/g, "+").replace(/_/g, "/"))].map((letter) => letter.charCodeAt(0));
  if (values.some((value) => value > 242) || (values.length - 1) * 5 >= index.cells.length) {
    problems.push("o belongs to another pair");
    return overrides;
  }
  index.cells.forEach((cell, i) => {
    const digit = Math.floor((values[Math.floor(i / 5)] || 0) / 3 ** (i % 5)) % 3;
    if (digit) overrides[cell.name] = BY_HAND[digit];
  });
  return overrides;
}

function linkQuery(map) {
  const { s, lambda, similarity, variant, overrides } = map.plan, query = new URLSearchParams();
  query.set("v", LINK_VERSION);
  query.set("pack", map.packId);
  query.set("s", String(s));
  query.set("l", lambdaText(lambda));
  if (similarity !== DEFAULT_PLAN.similarity) query.set("m", similarity);
  if (variant !== DEFAULT_PLAN.variant) query.set("u", variant);
  if (Object.keys(overrides).length) query.set("o", packOverrides(map.index, overrides));
  if (map.target?.kind === "cell") query.set("c", `${map.target.cell.layer}.${map.target.cell.module}`);
  return query;
}

// The whole address: of the Space's page where there is one, else of this page, other keys kept.
function linkAddress(map) {
  const query = linkQuery(map);
  if (map.home) return `${map.home}?${query}`;
  const address = new URL(window.location.href);
  for (const key of LINK_KEYS) address.searchParams.delete(key);
  for (const [key, value] of query) address.searchParams.set(key, value);
  address.hash = "";
  return address.href;
}

// The query to read: the address's own or, in a frame whose page keeps its own address, what this tab
// remembers, so that a reload brings the plan back there too.
function linkSearch() {
  if (arrival.has("v") || window.top === window) return window.location.search;
  try { return window.sessionStorage.getItem(MEMORY) || ""; } catch { return ""; }
}

// What a link says about this pair: { pack, plan, cell, problems }, or null where it says nothing.
function readLink(search, map) {
  const query = new URLSearchParams(search);
  if (!query.has("v")) return null;
  if (query.get("v") !== LINK_VERSION) return { pack: null, problems: [`this link is of version ${String(query.get("v")).slice(0, 12)}, which this page does not know`] };
  const problems = [], raw = { overrides: unpackOverrides(map.index, query.get("o"), problems) };
  for (const [key, name] of [["s", "s"], ["l", "lambda"], ["m", "similarity"], ["u", "variant"]]) {
    if (query.has(key)) raw[name] = query.get(key);
  }
  const plan = cleanPlan(raw, map.index, problems);
  const [layer, module] = (query.get("c") || "").split(".");
  return { pack: query.get("pack"), plan, cell: map.index.at.get(`${Number(layer)}.${module}`) || null, problems };
}

function rememberLink(map) {
  if (!map.packId || window.location.protocol === "file:") return;
  const address = new URL(window.location.href);
  for (const key of LINK_KEYS) address.searchParams.delete(key);
  for (const [key, value] of linkQuery(map)) address.searchParams.set(key, value);
  window.history.replaceState(window.history.state, "", address);
  try { window.sessionStorage.setItem(MEMORY, `?${linkQuery(map)}`); } catch { /* closed: the address has it */ }
}
