// Lists this pack's templates in their order: the server names a folder's files in the order in which the disk has them.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

// The folder that this file is served from: /extensions/<folder>/js/templates.js.
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
