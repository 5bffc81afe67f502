// Gives the text on this pack's nodes a place of its own: the node grows by its height and shrinks again when the text
// is cleared, so that no prompt or picture is squeezed for it.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const CATEGORY = "EchoDistill";
const WIDGET = "$$node-text-preview"; // ComfyUI's own, made at a node's first text
const LINE = 18; // pixels of a line, at the front end's font size
const LETTER = 6.5;
const MARGIN = 22;

function height(text, width) {
  const lines = text
    .split("\n")
    .reduce((sum, line) => sum + Math.max(1, Math.ceil((line.length * LETTER) / Math.max(1, width - 50))), 0);
  return lines * LINE + MARGIN;
}

function place(node, text) {
  const index = node.widgets?.findIndex((widget) => widget.name === WIDGET) ?? -1;
  if (index < 0) return;
  const widget = node.widgets[index];
  const before = node.echodistillTextHeight ?? 0;
  const after = text ? height(text, node.size[0]) : 0;
  if (!text) {
    widget.onRemove?.();
    node.widgets.splice(index, 1);
  } else {
    widget.options.getMinHeight = () => after;
    widget.options.getMaxHeight = () => after;
  }
  node.echodistillTextHeight = after;
  if (after !== before) node.setSize([node.size[0], node.size[1] + after - before]);
  app.canvas?.setDirty(true, true);
}

app.registerExtension({
  name: "EchoDistill.nodeText",
  setup() {
    api.addEventListener("progress_text", ({ detail }) => {
      if (globalThis.LiteGraph?.vueNodesMode) return;
      const node = app.graph?.getNodeById?.(Number(detail.nodeId)) ?? app.graph?.getNodeById?.(detail.nodeId);
      if (node?.constructor?.nodeData?.category !== CATEGORY) return;
      // After the front end has made or filled its widget. Texts come as HTML, in which <new1> is &lt;new1&gt;.
      const text = detail.text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
      setTimeout(() => place(node, text), 0);
    });
  },
});
