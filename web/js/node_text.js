// Resizes this pack's nodes for the text on them: a node grows by the height of its text and shrinks when the text is
// cleared, so prompts and pictures keep their size. Validation errors of ComfyUI are shown in the same text.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const CATEGORY = "EchoDistill";
const WIDGET = "$$node-text-preview"; // ComfyUI's own widget, created with a node's first text
const LINE = 17; // height of a line in pixels, at the front end's font size
const LETTER = 6.4; // mean width of a letter in pixels
const MARGIN = 24;
const HIGHEST = 210; // pixels; the front end scrolls longer texts

// This pack's node with the given id, or null. Ids include the subgraphs: 7:5 is node 5 in the subgraph of node 7.
function packNode(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById?.(Number(part)) ?? graph?.getNodeById?.(part);
    graph = node?.subgraph;
  }
  return node?.constructor?.nodeData?.category === CATEGORY ? node : null;
}

// Number of lines of the text when it is broken between words, as `wrap` makes the browser break it.
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

// Breaks the text between words; the front end would break it within words.
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
  // Texts are sent as HTML, where <new1> is &lt;new1&gt;.
  return html.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
}

function html(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function showText(id, text) {
  api.dispatchEvent(new CustomEvent("progress_text", { detail: { nodeId: id, text: html(text) } }));
}

function showValidationErrors() {
  for (const [id, { errors }] of Object.entries(app.lastNodeErrors ?? {})) {
    const node = packNode(id);
    if (!node) continue;
    const texts = errors.map(({ message, details, extra_info }) => {
      const start = `${extra_info?.input_name} - `;
      return details?.startsWith(start) ? details.slice(start.length) : `${message}: ${details}`;
    });
    node.echodistillFailed = true;
    showText(id, texts.join("\n"));
  }
}

// A node with a cached result does not run again, so its earlier error text must be cleared here.
function clearErrors() {
  for (const node of app.graph?._nodes ?? []) {
    if (!node.echodistillFailed) continue;
    node.echodistillFailed = false;
    showText(String(node.id), "");
  }
}

// For a node with a cached result, ComfyUI sends its text only with the "executed" event. A node that ran has already
// sent its text and notes as progress.
function executed({ detail }) {
  const text = detail.output?.text;
  const node = packNode(detail.node);
  if (node && Array.isArray(text) && !node.echodistillText) showText(String(detail.node), text.join("\n"));
}

function failed({ detail }) {
  const node = packNode(detail.node_id);
  if (node) node.echodistillFailed = true;
  // A user error, described in one sentence; its traceback would not help.
  if (detail.exception_type === "EchoDistill") detail.traceback = [];
}

app.registerExtension({
  name: "EchoDistill.nodeText",
  setup() {
    api.addEventListener("progress_text", ({ detail }) => {
      if (globalThis.LiteGraph?.vueNodesMode) return;
      const node = packNode(detail.nodeId);
      if (!node) return;
      // Deferred until the front end has created or updated its widget; a newer text may have arrived by then.
      node.echodistillText = plain(detail.text);
      setTimeout(() => place(node, node.echodistillText), 0);
    });
    api.addEventListener("execution_start", clearErrors);
    api.addEventListener("execution_error", failed);
    api.addEventListener("executed", executed);
    const queuePrompt = app.queuePrompt;
    app.queuePrompt = async function (...args) {
      const result = await queuePrompt.apply(this, args);
      showValidationErrors();
      return result;
    };
  },
});
