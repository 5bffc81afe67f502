// Sorts this pack's templates by name; the server lists them in the file system's order.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

// Name of the pack's folder, from this file's URL: /extensions/<folder>/js/templates.js.
const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.split("/extensions/")[1]?.split("/")[0] ?? "");

app.registerExtension({
  name: "EchoDistill.templates",
  init() {
    const original = api.getWorkflowTemplates;
    if (typeof original !== "function") return;
    api.getWorkflowTemplates = async function (...args) {
      const templates = await original.apply(this, args);
      templates?.[FOLDER]?.sort?.();
      return templates;
    };
  },
});
