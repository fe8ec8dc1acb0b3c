"use strict";
// One chain of thought, or two side by side. What a model wrote goes into the page as text, and never as markup.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);

function made(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

const buffer = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
const counted = (n) => n.toLocaleString("en-US");
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

// A token in a row: what has no shape of its own gets one.
function visible(text) {
  return text.replace(/\r?\n/g, "↵").replace(/\t/g, "⇥").replace(/[\u0000-\u001f\u007f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "␦");
}

function number(value) {
  if (Number.isNaN(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return String(value);
  const size = Math.abs(value);
  return size >= 0.01 && size < 1e5 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}

// The last place of a rising list that is not above a value.
function place(list, value) {
  let low = 0, high = list.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (list[middle] <= value) low = middle + 1; else high = middle;
  }
  return low - 1;
}

// The least and the largest value in each of some columns, so that no peak is lost however many tokens a pixel has.
function decimated(values, from, to, columns) {
  const low = new Float32Array(columns).fill(NaN), high = new Float32Array(columns).fill(NaN);
  for (let column = 0; column < columns; column++) {
    const start = Math.floor(from + (column * (to - from)) / columns);
    const stop = Math.max(start + 1, Math.floor(from + ((column + 1) * (to - from)) / columns));
    for (let i = start; i < Math.min(stop, values.length); i++) {
      if (!(values[i] >= low[column])) low[column] = Number.isNaN(values[i]) ? low[column] : values[i];
      if (!(values[i] <= high[column])) high[column] = Number.isNaN(values[i]) ? high[column] : values[i];
    }
  }
  return [low, high];
}

// What the page holds of one completion.
class Chain {
  constructor(words) {
    Object.assign(this, words);
    this.index = new Uint32Array(buffer(words.index));
    this.length = this.index.length;
    this.shown = this.texts.map(visible);
    this.owner = new Int32Array(this.length).fill(-1); // of each token its segment
    this.segments.forEach(([start, stop], number) => this.owner.fill(number, start, stop));
    this.marked = new Set(Object.values(this.markers).flat());
    this.tracks = this.tracks.map((track) => ({ ...track, values: new Float32Array(buffer(track.values)) }));
    let at = 0;
    this.begins = new Uint32Array(this.length); // of each token, where it begins in the text that is searched
    this.small = Array.from(this.index, (n, i) => {
      const text = this.texts[n].toLowerCase();
      this.begins[i] = at;
      at += text.length;
      return text;
    }).join("");
  }

  text(i) { return this.texts[this.index[i]]; }

  phase(i) {
    if (i < this.prompt) return "prompt";
    return i >= this.thinking[0] && i < this.thinking[1] ? "thinking" : "answer";
  }

  label(i) { return this.owner[i] < 0 ? null : this.segments[this.owner[i]][2]; }

  // All that is known of a token, a pair a line.
  facts(i) {
    const known = [["token", JSON.stringify(this.text(i))]];
    if (this.ids) known.push(["id", String(this.ids[this.index[i]])]);
    known.push(["position", counted(i)], ["phase", this.phase(i)]);
    if (this.owner[i] >= 0) {
      const [start, stop, label] = this.segments[this.owner[i]];
      known.push(["segment", `${label}, ${counted(start)} to ${counted(stop - 1)}`]);
    }
    for (const { name, unit, values } of this.tracks) known.push([name, `${number(values[i])} ${unit}`.trim()]);
    return known;
  }

  // The tokens, first and last, of each place where the text has the words.
  found(words) {
    const wanted = words.toLowerCase(), hits = [];
    for (let at = wanted ? this.small.indexOf(wanted) : -1; at >= 0; at = this.small.indexOf(wanted, at + wanted.length)) {
      hits.push([place(this.begins, at), place(this.begins, at + wanted.length - 1)]);
    }
    return hits;
  }
}
