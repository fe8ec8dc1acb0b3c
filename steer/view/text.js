const ROW = 24, GUTTER = 66; // a row of text and the numbers before it, in pixels
const AHEAD = 12; // rows that are kept ready above and below what is seen

// The text of a chain in rows of one height, of which only those that are seen are in the page.
class Text {
  constructor(chain, box) {
    this.chain = chain;
    this.box = box;
    this.rows = box.appendChild(made("div", "rows"));
    this.drawn = new Map();
    this.starts = [0];
    box.addEventListener("scroll", () => this.draw(), { passive: true });
  }

  lay() {
    const top = this.starts[this.first()];
    const pen = made("canvas").getContext("2d");
    pen.font = getComputedStyle(this.box).font;
    const letter = pen.measureText("x".repeat(100)).width / 100; // all of ASCII is as wide, and measuring takes long
    const wide = (text) => (/^[ -~]*$/.test(text) ? text.length * letter : pen.measureText(text).width);
    const widths = this.chain.shown.map((text) => Math.max(wide(text), 3) + 1);
    const ends = this.chain.texts.map((text) => text.includes("\n"));
    const room = this.box.clientWidth - GUTTER;
    this.starts = [0];
    for (let i = 0, x = 0; i < this.chain.length; i++) {
      const word = this.chain.index[i];
      if (x > 0 && x + widths[word] > room) {
        this.starts.push(i);
        x = 0;
      }
      x += widths[word];
      if (ends[word] && i + 1 < this.chain.length) {
        this.starts.push(i + 1);
        x = 0;
      }
    }
    this.rows.style.height = `${this.starts.length * ROW}px`;
    this.box.scrollTop = this.row(top) * ROW;
    this.redraw();
  }

  row(i) { return Math.max(0, place(this.starts, i)); }

  first() { return clamp(Math.floor(this.box.scrollTop / ROW), 0, this.starts.length - 1); }

  // The tokens that are seen, the last one left out.
  seen() {
    const last = Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW);
    return [this.starts[this.first()], last < this.starts.length ? this.starts[last] : this.chain.length];
  }

  redraw() {
    this.rows.replaceChildren();
    this.drawn.clear();
    this.draw();
  }

  draw() {
    const from = Math.max(0, this.first() - AHEAD);
    const to = Math.min(this.starts.length, this.first() + Math.ceil(this.box.clientHeight / ROW) + AHEAD);
    for (const [row, element] of this.drawn) {
      if (row >= from && row < to) continue;
      element.remove();
      this.drawn.delete(row);
    }
    for (let row = from; row < to; row++) {
      if (!this.drawn.has(row)) this.drawn.set(row, this.rows.appendChild(this.line(row)));
    }
  }

  line(row) {
    const line = made("div", "row"), start = this.starts[row];
    line.style.top = `${row * ROW}px`;
    line.append(made("span", "at", counted(start)));
    const stop = row + 1 < this.starts.length ? this.starts[row + 1] : this.chain.length;
    for (let i = start; i < stop; i++) {
      const token = line.appendChild(made("i", "", this.chain.shown[this.chain.index[i]]));
      token.dataset.i = i;
      dress(token, this.chain, i);
    }
    return line;
  }

  token(i) {
    const line = this.drawn.get(this.row(i));
    return line ? line.children[1 + i - this.starts[this.row(i)]] : null;
  }

  // Scroll to a token, a third down, where it is not seen already.
  show(i, always) {
    const top = this.row(i) * ROW, { scrollTop, clientHeight } = this.box;
    if (always || top < scrollTop || top + ROW > scrollTop + clientHeight) this.box.scrollTop = top - clientHeight / 3;
    this.draw();
  }
}
