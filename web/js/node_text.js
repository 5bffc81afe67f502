// Gives the text on this pack's nodes a place of its own: the node grows by its height and shrinks again when the text
// is cleared, so that no prompt or picture is squeezed for it. What ComfyUI refuses before it runs is shown there as well.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const CATEGORY = "EchoDistill";
const WIDGET = "$$node-text-preview"; // ComfyUI's own, made at a node's first text
const LINE = 17; // pixels of a line, at the front end's font size
const LETTER = 6.4;
const MARGIN = 24;
const HIGHEST = 210; // the front end scrolls what is longer

// A node by its id, which names the subgraphs on the way: 7:5 is node 5 in the subgraph of node 7.
function ours(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById?.(Number(part)) ?? graph?.getNodeById?.(part);
    graph = node?.subgraph;
  }
  return node?.constructor?.nodeData?.category === CATEGORY ? node : null;
}

// Lines that the text takes when it is broken between words, as `wrap` lets the browser break it.
function lines(text, width) {
  const letters = Math.max(10, Math.floor((width - 56) / LETTER));
  let count = 0;
  for (const line of text.split("\n")) {
    let used = 0;
    count += 1;
    for (const word of line.split(" ")) {
      if (used && used + 1 + word.length > letters) {
        count += 1;
        used = 0;
      }
      count += Math.floor(Math.max(0, word.length - 1) / letters);
      used += (used ? 1 : 0) + (word.length % letters);
    }
  }
  return count;
}

// The front end breaks these texts in the middle of words.
function wrap(text) {
  const letters = text.replaceAll(/\s/g, "");
  for (const element of document.querySelectorAll(".break-all")) {
    if (element.textContent.replaceAll(/\s/g, "") !== letters) continue;
    element.style.wordBreak = "normal";
    element.style.overflowWrap = "anywhere";
  }
}

function place(node, text) {
  const index = node.widgets?.findIndex((widget) => widget.name === WIDGET) ?? -1;
  if (index < 0) return;
  const widget = node.widgets[index];
  const before = node.echodistillTextHeight ?? 0;
  const after = text ? Math.min(HIGHEST, lines(text, node.size[0]) * LINE + MARGIN) : 0;
  if (text) {
    widget.options.getMinHeight = () => after;
    widget.options.getMaxHeight = () => after;
    requestAnimationFrame(() => wrap(text));
  } else {
    widget.onRemove?.();
    node.widgets.splice(index, 1);
  }
  node.echodistillTextHeight = after;
  if (after !== before) node.setSize([node.size[0], node.size[1] + after - before]);
  app.canvas?.setDirty(true, true);
}

function plain(html) {
  // Texts come as HTML, in which <new1> is &lt;new1&gt;.
  return html.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
}

function html(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function say(id, text) {
  api.dispatchEvent(new CustomEvent("progress_text", { detail: { nodeId: id, text: html(text) } }));
}

function showRefusals() {
  for (const [id, { errors }] of Object.entries(app.lastNodeErrors ?? {})) {
    const node = ours(id);
    if (!node) continue;
    const said = errors.map(({ message, details, extra_info }) => {
      const start = `${extra_info?.input_name} - `;
      return details?.startsWith(start) ? details.slice(start.length) : `${message}: ${details}`;
    });
    node.echodistillFailed = true;
    say(id, said.join("\n"));
  }
}

// A node whose result is in ComfyUI's cache does not run, so what it said of an earlier mistake has to be taken away.
function clearMistakes() {
  for (const node of app.graph?._nodes ?? []) {
    if (!node.echodistillFailed) continue;
    node.echodistillFailed = false;
    say(String(node.id), "");
  }
}

// ComfyUI sends the text of a node that it took from its cache again, but not as progress. One that ran has said it
// already, with its notes.
function executed({ detail }) {
  const text = detail.output?.text;
  const node = ours(detail.node);
  if (node && Array.isArray(text) && !node.echodistillText) say(String(detail.node), text.join("\n"));
}

function failed({ detail }) {
  const node = ours(detail.node_id);
  if (node) node.echodistillFailed = true;
  // A user's mistake, said in one sentence: where in the program it was noticed helps nobody.
  if (detail.exception_type === "EchoDistill") detail.traceback = [];
}

app.registerExtension({
  name: "EchoDistill.nodeText",
  setup() {
    api.addEventListener("progress_text", ({ detail }) => {
      if (globalThis.LiteGraph?.vueNodesMode) return;
      const node = ours(detail.nodeId);
      if (!node) return;
      // After the front end has made or filled its widget; by then a newer text may be there.
      node.echodistillText = plain(detail.text);
      setTimeout(() => place(node, node.echodistillText), 0);
    });
    api.addEventListener("execution_start", clearMistakes);
    api.addEventListener("execution_error", failed);
    api.addEventListener("executed", executed);
    const queuePrompt = app.queuePrompt;
    app.queuePrompt = async function (...args) {
      const result = await queuePrompt.apply(this, args);
      showRefusals();
      return result;
    };
  },
});
