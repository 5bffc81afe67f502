// Collapses the advanced inputs of this pack's nodes behind a button, in front ends that draw nodes on a canvas and do
// not collapse them. Values of collapsed inputs are sent and saved like all others.
import { app } from "../../../scripts/app.js";

const CATEGORY = "EchoDistill";

function advancedNames(nodeData) {
  const inputs = { ...nodeData?.input?.required, ...nodeData?.input?.optional };
  return new Set(Object.keys(inputs).filter((name) => inputs[name][1]?.advanced));
}

function fold(node, widgets, button, folded) {
  for (const widget of widgets) {
    widget.hidden = folded;
    // A hidden widget still takes up layout height unless its size is 0; -4 removes the gap between widgets.
    if (folded) widget.computeSize = () => [0, -4];
    else delete widget.computeSize;
  }
  button.name = button.label = folded ? `Show ${widgets.length} advanced inputs` : "Hide advanced inputs";
  node.setSize([node.size[0], node.computeSize()[1]]);
  app.canvas?.setDirty(true, true);
}

app.registerExtension({
  name: "EchoDistill.advanced",
  nodeCreated(node) {
    const nodeData = node.constructor.nodeData;
    if (nodeData?.category !== CATEGORY || globalThis.LiteGraph?.vueNodesMode) return;
    const names = advancedNames(nodeData);
    const widgets = (node.widgets ?? []).filter((widget) => names.has(widget.name));
    if (widgets.length < 4) return;
    let folded = true;
    const button = node.addWidget("button", "advanced", null, () => {
      folded = !folded;
      fold(node, widgets, button, folded);
    });
    // Workflows store widget values by position, so the button must not be stored.
    button.serialize = false;
    button.options.serialize = false;
    fold(node, widgets, button, folded);
  },
});
