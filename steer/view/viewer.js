// What is looked at and how, and the keys, buttons and pointers that change it.
const keyOf = (track) => `${track.group}\n${track.name}`;
const sides = [];
const state = { on: new Set(), ranges: new Map(), colours: new Map(), shade: null, token: null, active: null,
  hits: [], hit: -1, linked: true, inks: new Map() };

function ink(name) {
  if (!state.inks.has(name)) {
    const probe = document.body.appendChild(made("span"));
    probe.style.color = `var(--${name})`;
    state.inks.set(name, getComputedStyle(probe).color);
    probe.remove();
  }
  return state.inks.get(name);
}

// How a token looks: its segment, its track's value, and whether it is found, marked, looked at, or the first that differs.
function dress(token, chain, i) {
  const side = sides.find((one) => one.chain === chain), label = chain.label(i), names = [];
  if (i < chain.prompt) names.push("prompt");
  if (chain.marked.has(i)) names.push("marker");
  if (data.shared !== null && i === data.shared) names.push("differs");
  token.style.borderBottomColor = label ? data.colours[label] : "";
  const track = state.shade && chain.tracks.find((one) => keyOf(one) === state.shade);
  const value = track ? track.values[i] : NaN;
  if (!Number.isNaN(value)) {
    const [low, high] = state.ranges.get(state.shade);
    const signed = low < 0 && high > 0, most = Math.max(-low, high);
    names.push(signed && value < 0 ? "down" : "up");
    const share = signed ? Math.abs(value) / most : (value - low) / (high - low || 1);
    token.style.setProperty("--shade", clamp(share, 0, 1));
  }
  const hit = side?.hitOf?.[i];
  if (hit) names.push("match", ...(hit === state.hit + 1 ? ["chosen"] : []));
  if (state.token?.side === side && state.token.i === i) names.push("current");
  if (twin(side) === i) names.push("twin");
  token.className = names.join(" ");
}

// On the other side, what stands where the token is that is looked at.
function twin(side) {
  const at = state.token;
  return at && side && at.side !== side ? at.twin : null;
}

function across(i, from, to) {
  const a = sides.indexOf(from), b = sides.indexOf(to), ours = data.pairs.map((pair) => pair[a]);
  const n = clamp(place(ours, i), 0, data.pairs.length - 2), [one, next] = [data.pairs[n], data.pairs[n + 1]];
  const share = next[a] > one[a] ? (i - one[a]) / (next[a] - one[a]) : 0;
  return clamp(Math.floor(one[b] + share * (next[b] - one[b])), 0, to.chain.length - 1);
}

function redress() {
  for (const { chain, text } of sides) {
    for (const line of text.drawn.values()) {
      for (const token of line.querySelectorAll("i")) dress(token, chain, Number(token.dataset.i));
    }
  }
}

function redraw() {
  for (const { chart } of sides) chart.draw();
}

// Look at a token: by a key, a search or a click.
function go(side, i, always) {
  const at = clamp(i, 0, side.chain.length - 1), other = sides.find((one) => one !== side);
  state.token = { side, i: at, twin: other ? across(at, side, other) : null };
  state.active = side;
  side.text.show(state.token.i, always);
  if (state.linked) follow(side);
  redress();
  for (const one of sides) one.chart.place();
  const token = side.text.token(state.token.i);
  if (token) tell(side, state.token.i, token.getBoundingClientRect());
}

function follow(side) {
  for (const other of sides) {
    if (other === side) continue;
    const [top] = side.text.seen();
    const down = side.text.box.scrollTop - side.text.row(top) * ROW;
    other.text.box.scrollTop = other.text.row(across(top, side, other)) * ROW + down;
  }
}

function tell(side, i, where) {
  const table = made("table");
  for (const [name, value] of side.chain.facts(i)) {
    const row = table.appendChild(made("tr", name === "token" ? "token" : ""));
    row.append(made("th", "", name), made("td", "", value));
  }
  const tip = $("tip");
  tip.replaceChildren(table);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect(), below = where.bottom + 6;
  const top = below + height < innerHeight ? below : Math.max(4, where.top - height - 6);
  tip.style.transform = `translate(${clamp(where.left, 4, Math.max(4, innerWidth - width - 4))}px, ${top}px)`;
}

const hush = () => { $("tip").hidden = true; };

function search(words) {
  state.hits = sides.flatMap((side) => side.chain.found(words).map((hit) => ({ side, hit })));
  for (const side of sides) side.hitOf = new Int32Array(side.chain.length); // of each token its hit, from 1 on
  state.hits.forEach(({ side, hit: [first, last] }, n) => side.hitOf.fill(n + 1, first, last + 1));
  state.hit = -1;
  if (state.hits.length) step(1); else redress();
  count();
}

function count() {
  const words = $("find").value, n = state.hits.length;
  $("found").textContent = !words ? "" : n ? `${counted(state.hit + 1)} of ${counted(n)}` : "none";
  $("previous").disabled = $("next").disabled = !n;
}

function step(by) {
  if (!state.hits.length) return;
  state.hit = (state.hit + by + state.hits.length) % state.hits.length;
  const { side, hit } = state.hits[state.hit];
  go(side, hit[0], true);
  count();
}

// To the next of some places in the chain that is looked at, or around to the first.
function jump(places, by) {
  const side = state.active ?? sides[0];
  const list = places(side.chain);
  if (!list.length) return;
  const at = state.token?.side === side ? state.token.i : by > 0 ? -1 : side.chain.length;
  const next = by > 0 ? list.find((i) => i > at) : list.findLast((i) => i < at);
  go(side, next ?? list.at(by > 0 ? 0 : -1), true);
}

const markers = (chain) => {
  const name = $("marker").value;
  return name ? chain.markers[name] ?? [] : [...chain.marked].sort((a, b) => a - b);
};
const openings = (chain) => chain.segments.map(([start]) => start);

function theme() {
  const dark = ink("paper") !== "rgb(255, 255, 255)", root = document.documentElement;
  root.style.colorScheme = root.dataset.theme = dark ? "light" : "dark";
  recolour();
}

function recolour() {
  state.inks.clear();
  redraw();
}

function turn(key) {
  if (!state.on.delete(key)) state.on.add(key);
  for (const chip of document.querySelectorAll(".chip")) chip.setAttribute("aria-pressed", state.on.has(chip.key));
  redraw();
  for (const { text } of sides) text.draw();
}

function lines(by) {
  const side = state.active ?? sides[0], { text } = side;
  const i = state.token?.side === side ? state.token.i : text.seen()[0];
  const row = text.row(i), next = clamp(row + by, 0, text.starts.length - 1);
  const stop = next + 1 < text.starts.length ? text.starts[next + 1] : side.chain.length;
  go(side, Math.min(text.starts[next] + i - text.starts[row], stop - 1));
}

function along(by) {
  const side = state.active ?? sides[0];
  go(side, state.token?.side === side ? state.token.i + by : side.text.seen()[0]);
}

function zoom(factor) {
  for (const side of sides) {
    const { chart } = side, at = state.token?.side === side ? state.token.i : (chart.from + chart.to) / 2;
    if (factor) chart.zoom(factor, clamp(at, chart.from, chart.to)); else chart.all();
  }
  redraw();
}

const KEYS = {
  "/": () => $("find").select(),
  n: () => step(1),
  N: () => step(-1),
  m: () => jump(markers, 1),
  M: () => jump(markers, -1),
  s: () => jump(openings, 1),
  S: () => jump(openings, -1),
  ArrowRight: () => along(1),
  ArrowLeft: () => along(-1),
  ArrowDown: () => lines(1),
  ArrowUp: () => lines(-1),
  "+": () => zoom(0.5),
  "-": () => zoom(2),
  0: () => zoom(0),
  t: theme,
  "?": () => $("help").showModal(),
  Escape: hush,
};

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") {
      event.preventDefault(); // what is searched for stays
      event.target.blur();
    }
    if (event.key === "Enter") step(event.shiftKey ? -1 : 1);
    return;
  }
  const chip = /^[1-9]$/.test(event.key) ? document.querySelectorAll(".chip")[event.key - 1] : null;
  const act = chip ? () => chip.click() : Object.hasOwn(KEYS, event.key) ? KEYS[event.key] : null;
  if (!act) return;
  event.preventDefault();
  act();
}

// The tracks of both sides, each once, with one colour and one range: that over what was written, as a prompt's first
// tokens may lie far from all others.
function gather() {
  for (const { chain, track } of sides.flatMap(({ chain }) => chain.tracks.map((track) => ({ chain, track })))) {
    const key = keyOf(track), range = state.ranges.get(key) ?? [Infinity, -Infinity];
    const written = track.values.subarray(chain.prompt), known = written.some((value) => !Number.isNaN(value));
    for (const value of known ? written : track.values) {
      if (value < range[0]) range[0] = value;
      if (value > range[1]) range[1] = value;
    }
    if (!state.colours.has(key)) state.colours.set(key, data.cycle[state.colours.size % data.cycle.length]);
    state.ranges.set(key, range);
  }
  for (const [key, range] of state.ranges) if (range[0] > range[1]) state.ranges.set(key, [0, 0]);
  state.on = new Set([...state.ranges.keys()].slice(0, 8));
}

function offer() {
  const groups = new Map(), swatch = (colour) => {
    const mark = made("span", "swatch");
    mark.style.background = colour;
    return mark;
  };
  for (const key of state.ranges.keys()) {
    const [group, name] = key.split("\n");
    if (!groups.has(group)) groups.set(group, $("tracks").appendChild(made("div"))).get(group).append(made("b", "", group));
    const chip = groups.get(group).appendChild(made("button", "chip"));
    chip.append(swatch(state.colours.get(key)), name);
    chip.key = key;
    chip.setAttribute("aria-pressed", state.on.has(key));
    chip.addEventListener("click", () => turn(key));
    $("shade").append(new Option(`${group}: ${name}`, key));
  }
  const labels = new Set(sides.flatMap(({ chain }) => chain.segments.map(([, , label]) => label)));
  for (const label of Object.keys(data.colours).filter((name) => labels.has(name))) {
    const legend = $("tracks").appendChild(made("span", "label"));
    legend.append(swatch(data.colours[label]), label);
  }
  const names = [...new Set(sides.flatMap(({ chain }) => Object.keys(chain.markers)))];
  const many = (name) => sides.map(({ chain }) => (chain.markers[name] ?? []).length).join(" / ");
  $("marker").append(new Option("all markers", ""), ...names.map((name) => new Option(`${visible(name)} (${many(name)})`, name)));
  for (const id of ["marker", "earlier", "later"]) $(id).disabled = !names.length;
  $("shade").disabled = !state.ranges.size;
  $("link").hidden = sides.length < 2;
}

function build(words) {
  const box = $("sides").appendChild(made("section", "side")), top = box.appendChild(made("div", "top"));
  const title = top.appendChild(made("h2", "", words.name));
  title.append(made("span", "", words.about));
  const chart = box.appendChild(made("div", "chart")), text = box.appendChild(made("div", "text"));
  text.tabIndex = 0;
  text.setAttribute("aria-label", `${words.name}: the text, token by token`);
  const chain = new Chain(words);
  const side = { chain, hitOf: null, chart: new Chart(chain, chart), text: new Text(chain, text) };
  sides.push(side);
  for (const [sign, what, factor] of [["−", "zoom out", 2], ["+", "zoom in", 0.5], ["all", "the whole chain", 0]]) {
    const button = top.appendChild(made("button", "", sign));
    button.title = what;
    button.addEventListener("click", () => zoom(factor));
  }
  listen(side, chart, text);
}

function listen(side, chart, text) {
  const lead = () => { state.active = side; };
  for (const kind of ["pointerenter", "focusin", "wheel", "touchstart"]) text.addEventListener(kind, lead, { passive: true });
  text.addEventListener("scroll", () => {
    side.chart.place();
    if (state.linked && state.active === side) follow(side);
  }, { passive: true });
  const tokenAt = (event) => event.target.dataset.i === undefined ? null : Number(event.target.dataset.i);
  text.addEventListener("pointermove", (event) => {
    const i = tokenAt(event);
    if (i === null) hush(); else tell(side, i, event.target.getBoundingClientRect());
  });
  text.addEventListener("pointerleave", hush);
  text.addEventListener("click", (event) => {
    const i = tokenAt(event);
    if (i !== null && getSelection().isCollapsed) go(side, i);
  });
  let held = null;
  const x = (event) => event.clientX - chart.getBoundingClientRect().left;
  chart.addEventListener("pointerdown", (event) => {
    held = { x: x(event), moved: false };
    chart.setPointerCapture(event.pointerId);
  });
  chart.addEventListener("pointermove", (event) => {
    if (held) {
      if (Math.abs(x(event) - held.x) > 3) held.moved = true;
      if (!held.moved) return;
      side.chart.move(((held.x - x(event)) / chart.clientWidth) * (side.chart.to - side.chart.from));
      held.x = x(event);
      side.chart.draw();
    } else {
      const { clientX, clientY } = event;
      tell(side, side.chart.token(x(event)), { left: clientX + 12, top: clientY, bottom: clientY + 8 });
    }
  });
  chart.addEventListener("pointerup", (event) => {
    if (held && !held.moved) go(side, side.chart.token(x(event)), true);
    held = null;
  });
  chart.addEventListener("pointerleave", hush);
  chart.addEventListener("wheel", (event) => {
    event.preventDefault();
    const span = side.chart.to - side.chart.from;
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) side.chart.move((event.deltaX / chart.clientWidth) * span);
    else side.chart.zoom(event.deltaY > 0 ? 1.25 : 0.8, side.chart.from + (x(event) / chart.clientWidth) * span);
    side.chart.draw();
  }, { passive: false });
}

function fit() {
  redraw();
  for (const side of sides) {
    side.text.lay();
    side.chart.place();
  }
}

data.sides.forEach(build);
state.active = sides[0];
gather();
offer();
fit();
addEventListener("resize", () => requestAnimationFrame(fit));
addEventListener("keydown", press);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
$("find").addEventListener("input", (event) => search(event.target.value));
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("earlier").addEventListener("click", () => jump(markers, -1));
$("later").addEventListener("click", () => jump(markers, 1));
$("shade").addEventListener("change", (event) => { state.shade = event.target.value; redress(); });
$("theme").addEventListener("click", theme);
$("open-help").addEventListener("click", () => $("help").showModal());
$("link").addEventListener("click", () => {
  state.linked = !state.linked;
  $("link").setAttribute("aria-pressed", state.linked);
});
document.documentElement.dataset.ready = Math.round(performance.now());
