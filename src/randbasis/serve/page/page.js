// Two answers to one prompt, side by side. The key is in the field and nowhere else: no storage, no cookie, no address.

const MOST_ROWS = 200; // of the list, and of what a field offers
const METRICS_MS = 2000;
const byId = (id) => document.getElementById(id);

let models = [];
let asking = null; // what stops the two answers that come now
let watching = 0; // how often watching began
let before = null; // tokens and time of the metrics that were read last

// --- the server ---

const headers = () => {
  const key = byId("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
};

/** A response that is one; else the server's words as an error. */
async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { headers: headers(), cache: "no-store", credentials: "omit", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(`the server cannot be reached: ${error.message}`);
  }
  if (!response.ok) {
    const said = await response.json().catch(() => null);
    const failed = new Error(said?.error?.message ?? `the server answered ${response.status} ${response.statusText}`);
    failed.status = response.status;
    throw failed;
  }
  return response;
}

/** The values of a stream of server-sent events, up to [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer broke off: the connection ended");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// --- one answer ---

async function answer(place, body, signal) {
  const [trouble, text, figures] = [".trouble", ".text", ".figures"].map((one) => place.querySelector(one));
  place.querySelector("h2").textContent = `Answer ${place.id.at(-1).toUpperCase()}: ${body.model}`;
  trouble.textContent = text.textContent = "";
  figures.textContent = "…";
  place.setAttribute("aria-busy", "true");
  const began = performance.now();
  const seen = { first: null, last: null, tokens: null, finish: "stopped here" };
  try {
    const options = { method: "POST", body: JSON.stringify(body), signal };
    for await (const event of events(await request("/v1/completions", options))) {
      const choice = event.choices[0];
      if (choice?.text) {
        seen.last = performance.now();
        seen.first ??= seen.last;
        text.append(choice.text);
      }
      seen.finish = choice?.finish_reason ?? seen.finish;
      seen.tokens = event.usage?.completion_tokens ?? seen.tokens;
    }
  } catch (error) {
    if (error.name !== "AbortError") trouble.textContent = error.message;
  }
  figures.textContent = seen.first === null ? "" : told(began, seen);
  place.setAttribute("aria-busy", "false");
}

/** Tokens a second are those behind the first, over the time that they took. */
function told(began, { first, last, tokens, finish }) {
  const parts = [`first token after ${Math.round(first - began)} ms`];
  if (tokens > 1 && last > first) parts.push(`${((1000 * (tokens - 1)) / (last - first)).toFixed(1)} tokens/s`);
  if (tokens !== null) parts.push(`${tokens} tokens`);
  return [...parts, finish].join(" · ");
}

async function askBoth(event) {
  event.preventDefault();
  if (asking !== null) return;
  asking = new AbortController();
  byId("stop").disabled = false;
  const body = {
    prompt: byId("prompt").value,
    max_tokens: byId("max-tokens").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  };
  const both = ["a", "b"].map((side) => {
    const model = byId(`model-${side}`).value.trim();
    return answer(byId(`answer-${side}`), { model, ...body }, asking.signal);
  });
  await Promise.all(both);
  asking = null;
  byId("stop").disabled = true;
  await readModels();
}

// --- the list ---

async function readModels() {
  try {
    models = (await (await request("/v1/models")).json()).data;
    byId("trouble").textContent = "";
  } catch (error) {
    models = [];
    byId("trouble").textContent = error.message;
  }
  showModels();
  const first = [byId("model-a"), byId("model-b")];
  first.forEach((field, place) => (field.value ||= (models[place] ?? models[0])?.id ?? ""));
}

function showModels() {
  const word = byId("filter").value.trim().toLowerCase();
  const found = models.filter((one) => `${one.id} ${one.method ?? "base"}`.toLowerCase().includes(word));
  const rows = found.slice(0, MOST_ROWS);
  byId("adapters").replaceChildren(...rows.map(row));
  byId("shown").textContent = `${rows.length} of ${found.length} shown, ${models.length} in all`;
  offer("");
}

function row(model) {
  const line = document.createElement("tr");
  const cells = [
    model.id,
    model.method ?? "base",
    model.version ?? "–",
    model.bytes?.toLocaleString("en") ?? "–",
    model.resident ? "yes" : "no",
  ];
  for (const value of cells) line.insertCell().textContent = value;
  const take = line.insertCell();
  for (const side of ["A", "B"]) {
    const button = document.createElement("button");
    button.textContent = side;
    button.setAttribute("aria-label", `Take ${model.id} as ${side}`);
    button.addEventListener("click", () => (byId(`model-${side.toLowerCase()}`).value = model.id));
    take.append(button);
  }
  return line;
}

/** What a field offers: names with what is typed in them. */
function offer(word) {
  const found = models.filter((one) => one.id.toLowerCase().includes(word.toLowerCase())).slice(0, MOST_ROWS);
  byId("offered").replaceChildren(...found.map((one) => Object.assign(document.createElement("option"), { value: one.id })));
}

// --- metrics ---

const NUMBERS = {
  Waiting: "randbasis_requests_waiting",
  Running: "randbasis_requests_running",
  "Tokens/s": null,
  "In memory": "randbasis_bank_adapters",
  Hits: "randbasis_bank_hits_total",
  Misses: "randbasis_bank_misses_total",
  "Resident bytes": "randbasis_bank_resident_bytes",
};

async function readMetrics() {
  const text = await (await request("/metrics")).text();
  const values = new Map(
    text
      .split("\n")
      .filter((line) => line && !line.startsWith("#") && !line.includes("{"))
      .map((line) => line.split(" "))
      .map(([name, value]) => [name, Number(value)]),
  );
  const now = { tokens: values.get("randbasis_generated_tokens_total") ?? 0, at: performance.now() };
  const rate = before && (1000 * (now.tokens - before.tokens)) / (now.at - before.at);
  before = now;
  const shown = Object.entries(NUMBERS).map(([label, name]) => {
    if (name === null) return [label, rate === null ? "–" : rate.toFixed(1)];
    const value = values.get(name);
    return [label, value === undefined ? "–" : value.toLocaleString("en")];
  });
  byId("metrics").replaceChildren(
    ...shown.map(([label, value]) => {
      const pair = document.createElement("div");
      pair.append(document.createElement("dt"), document.createElement("dd"));
      pair.firstChild.textContent = label;
      pair.lastChild.textContent = value;
      return pair;
    }),
  );
}

/** Now, and again for as long as that is wanted, somebody looks and the server answers. */
async function watch() {
  const mine = ++watching; // whoever was watching ends
  try {
    if (!document.hidden) await readMetrics();
    setTimeout(() => mine === watching && byId("live").checked && watch(), METRICS_MS);
  } catch (error) {
    byId("live").checked = false;
    if (error.status !== 401) byId("trouble").textContent = error.message;
  }
}

// --- what is pressed ---

async function useKey(event) {
  event.preventDefault();
  byId("model-a").value = byId("model-b").value = "";
  await readModels();
  if (byId("trouble").textContent === "" && !byId("live").checked) {
    byId("live").checked = true;
    watch();
  }
}

byId("access").addEventListener("submit", useKey);
byId("question").addEventListener("submit", askBoth);
byId("stop").addEventListener("click", () => asking?.abort());
byId("reload").addEventListener("click", readModels);
byId("filter").addEventListener("input", showModels);
byId("live").addEventListener("change", () => byId("live").checked && watch());
for (const side of ["a", "b"]) byId(`model-${side}`).addEventListener("input", (event) => offer(event.target.value));

readModels();
watch();
