// The schema in an editor: VS Code's JSON language service completes layer types and fields, explains them, and marks
// what is wrong. Run from the project's root, with the service installed anywhere that node finds it:
//
//     npm install --no-save vscode-json-languageservice
//     node tests/spec/editor.mjs
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const require = createRequire(resolve("package.json"));
const { getLanguageService, TextDocument } = require("vscode-json-languageservice");
const schema = JSON.parse(readFileSync("docs/spec.schema.json", "utf8"));
const service = getLanguageService({});
service.configure({ schemas: [{ uri: "invflow://spec", fileMatch: ["*"], schema }] });

const CURSOR = "|";

function open(marked) {
  const document = TextDocument.create("file:///spec.json", "json", 0, marked.replace(CURSOR, ""));
  return [document, document.positionAt(marked.indexOf(CURSOR)), service.parseJSONDocument(document)];
}

async function completions(marked) {
  const found = await service.doComplete(...open(marked));
  return found.items.map((item) => item.label.replaceAll('"', ""));
}

async function hover(marked) {
  const found = await service.doHover(...open(marked));
  return found.contents.join("\n").replaceAll("\\", "");
}

async function marks(text) {
  const [document, , parsed] = open(text + CURSOR);
  const found = await service.doValidation(document, parsed);
  return found.map((mark) => `${document.getText(mark.range)}: ${mark.message}`);
}

const spec = (layer) => `{"input": {"shape": [4, 4, 4]}, "layers": [${layer}]}`;
const coupling = (net) => spec(`{"type": "additive_coupling", "net": ${net}}`);
const includes = (found, ...wanted) => assert.deepEqual(wanted.filter((one) => !found.includes(one)), [], `${found}`);

includes(await completions(`{"${CURSOR}"}`), "input", "layers", "head", "training", "vars");
includes(await completions(spec(`{"type": "${CURSOR}"}`)), "psi", "split", "additive_coupling", "repeat");
includes(await completions(coupling(`{"type": "${CURSOR}"}`)), "conv", "mlp");
includes(await completions(spec(`{"type": "psi", "${CURSOR}"}`)), "block_size", "layout", "note");
assert.ok(!(await completions(spec(`{"type": "psi", "${CURSOR}"}`))).includes("net"));
includes(await completions(spec(`{"type": "psi", "layout": ${CURSOR}}`)), "block", "channel");
includes(await completions(coupling(`{"type": "conv", "activation": "${CURSOR}"}`)), "relu", "tanh");
includes(await completions(`{"head": {"type": "${CURSOR}"}}`), "linear", "convnet");
includes(await completions(`{"training": {"optimizer": {"type": "adam", "${CURSOR}"}}}`), "lr", "betas");

assert.match(await hover(spec(`{"type": "psi", "block_${CURSOR}size": 2}`)), /the side of a block, in pixels/);
assert.match(await hover(spec(`{"type": "p${CURSOR}si"}`)), /Moves each `block_size` x `block_size` block of pixels/);
assert.match(await hover(`{"training": {"epo${CURSOR}chs": 3}}`), /passes over the training images/);

const WRONG = [
  [spec('{"type": "psi", "blocksize": 2}'), '"blocksize": Property blocksize is not allowed.'],
  [spec('{"type": "psi", "block_size": 0}'), "0: Value is below the exclusive minimum of 0."],
  [spec('{"type": "psi", "block_size": "2"}'), '"2": Incorrect type. Expected "integer".'],
  [spec('{"type": "additive_coupling"}'), /Missing property "net"\.$/],
  [coupling('{"type": "conv", "kernel": 3}'), '"kernel": Property kernel is not allowed.'],
  [spec('{"type": "spilt"}'), /^"spilt": Value is not accepted\. Valid values: .*"split"/],
  [spec('{"type": "inverse", "layer": {"type": "psi", "x": 1}}'), '"x": Property x is not allowed.'],
  ['{"input": {"shape": [4]}, "layers": [], "training": {"epoch": 3}}', '"epoch": Property epoch is not allowed.'],
];
for (const [text, expected] of WRONG) {
  const found = await marks(text);
  assert.equal(found.length, 1, `${text}: ${found}`);
  (typeof expected === "string" ? assert.equal : assert.match)(found[0], expected);
}
assert.deepEqual(await marks(spec('{"type": "psi", "block_size": {"$var": "two"}}')), []);
console.log("completes, explains, marks");
