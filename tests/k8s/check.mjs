// Checks configs/k8s against the published schemas of Kubernetes, the Prometheus operator and KEDA.
// `make k8s-check`; needs Node. Values are checked by the schemas, and names of fields, which
// schemas leave open, by the types that are made from them.
import { execFileSync } from "node:child_process";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseAllDocuments } from "yaml";

const FOLDER = process.argv[2] ?? "../../configs/k8s";
const NOT_OF_THE_CLUSTER = ["Kustomization"]; // read by kubectl itself
const PACKAGES = {
  "keda.sh": "@kubernetes-models/keda/",
  "monitoring.coreos.com": "@kubernetes-models/prometheus-operator/",
};

let problems = 0;
let types = "";
for (const file of readdirSync(FOLDER).filter((name) => name.endsWith(".yaml")).sort()) {
  for (const document of parseAllDocuments(readFileSync(join(FOLDER, file), "utf8"))) {
    const object = document.toJS();
    if (NOT_OF_THE_CLUSTER.includes(object.kind)) continue;
    const group = object.apiVersion.split("/")[0];
    const module = `${PACKAGES[group] ?? "kubernetes-models/"}${object.apiVersion}/${object.kind}`;
    try {
      new (await import(module))[object.kind](object).validate();
      console.log(`${file}: ${object.apiVersion} ${object.kind}`);
    } catch (error) {
      problems++;
      console.error(`${file}: ${error.message}`);
    }
    const number = types.split("\n").length;
    types += `import { I${object.kind} as T${number} } from "${module}"; export const o${number}: T${number} = ${JSON.stringify(object)};\n`;
  }
}
writeFileSync("checked.ts", types);
try {
  execFileSync("npx", ["tsc", "--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "checked.ts"]);
} catch (error) {
  problems++;
  console.error(String(error.stdout));
}
process.exitCode = problems ? 1 : 0;
