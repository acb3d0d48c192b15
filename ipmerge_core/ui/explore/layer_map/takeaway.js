// @ts-check
// What can be taken away: JSON of the plan, CSV, SVG and PNG of the map, the HTML report, the link.

import { node, setText } from "../../web/dom.js";
import { planArguments } from "../../web/plan.js";
import { csvText, saveBlob, saveText } from "../../web/tables.js";
import { linkAddress, linkQuery } from "./link.js";
import { mapPicture } from "./picture.js";
import { announce } from "./status.js";

/** @import { Pack, Row } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */
/** @import { State } from "./types.d.ts" */

/** @param {Pick<Pack, "name">} pack */
export function fileStem({ name }) {
  return `ipmerge-${String(name).toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 40).replace(/^-|-$/g, "")}`;
}

/**
 * The plan with its preview, as `ipmerge_core` reads it.
 *
 * @param {Pick<State, "pack" | "packId" | "plan" | "result">} state
 */
export function planJson({ pack, packId, plan, result }) {
  const { masks, sums, ...preview } = result, { name, engine, created, parameters, sources } = pack;
  return `${JSON.stringify({ format: "ipmerge-choice", version: 1, pair: { id: packId, name, engine, created, parameters, sources },
    plan, arguments: planArguments(plan), preview }, null, 1)}\n`;
}

/**
 * @param {string} stem
 * @param {Row[]} rows
 */
export function saveCsv(stem, rows) {
  saveText(`${stem}.csv`, csvText(rows), "text/csv");
}

/** @param {LayerMap} map */
export function saveJson({ state }) {
  saveText(`${fileStem(state.pack)}.json`, planJson(state), "application/json");
}

/** @param {LayerMap} map */
function svgMarkup({ state, dom }) {
  return new XMLSerializer().serializeToString(mapPicture(state, dom.sum.textContent ?? ""));
}

/** @param {LayerMap} map */
export function saveSvg(map) {
  saveText(`${fileStem(map.state.pack)}.svg`, `<?xml version="1.0" encoding="UTF-8"?>\n${svgMarkup(map)}`, "image/svg+xml");
}

/**
 * Twice the size of the SVG, for screens of high density.
 *
 * @param {LayerMap} map
 */
export function savePng(map) {
  const image = new Image();
  image.onload = () => {
    const canvas = node("canvas", { width: 2 * image.width, height: 2 * image.height });
    canvas.getContext("2d")?.drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => { if (blob) saveBlob(`${fileStem(map.state.pack)}.png`, blob); }, "image/png");
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svgMarkup(map))}`;
}

/**
 * Copy the address of exactly this state; where the clipboard is closed, show it, selected.
 *
 * @param {LayerMap} map
 */
export async function copyLink(map) {
  const address = linkAddress(map.state, window.location.href), { link, note } = map.dom;
  try {
    await navigator.clipboard.writeText(address);
    announce(map, "Link copied.");
  } catch {
    link.hidden = false;
    link.value = address;
    link.focus();
    link.select();
    setText(note, "Copy the link from the field.");
  }
}

/**
 * One HTML file that needs no server: this component with the pack inside, put together in Python.
 *
 * @param {LayerMap} map
 */
export async function saveReport({ host, state, dom }) {
  setText(dom.note, "Saving the report …");
  try {
    const report = await host.server?.report_file?.(state.packId, state.plan, linkQuery(state).toString());
    if (typeof report !== "string") throw new TypeError("The server did not return a report.");
    saveText(`${fileStem(state.pack)}.html`, report, "text/html");
    setText(dom.note, "Report saved.");
  } catch {
    setText(dom.note, "Could not save the report. Reload the page and try again.");
  }
}
