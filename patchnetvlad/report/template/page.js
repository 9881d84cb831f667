"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const data = read("data");
  const pictures = read("pictures");
  const numQueries = data.queries.length;
  const outcomes = data.outcomes;
  const judged = outcomes.length > 0;
  const last = data.stages.length - 1;
  const BATCH = 20;

  // Elements. Names only ever become text, never markup.
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const svg = (tag, attributes = {}, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const byId = (id) => document.getElementById(id);
  const count = (value) => value.toLocaleString("en-US");
  const counted = (value, one, several) => `${count(value)} ${value === 1 ? one : several}`;
  const withUnit = (value) => `${value} ${value === 1 ? data.unit_one : data.unit}`;
  const distance = (value) => value === null ? "" :
    (value >= 10000 && data.unit === "m" ? (value / 1000).toPrecision(3) + " km" : withUnit(value >= 100 ? Math.round(value) : +value.toFixed(1)));

  const quoted = (name) => "'" + name.replaceAll("'", "'\\''") + "'"; // for a shell

  // Pictures: queries first, then the database's
  const source = (index) => pictures[index] === null ? null : "data:image/webp;base64," + pictures[index];
  const frame = (index, mark) => {
    const box = make("span", { class: "frame" });
    box.style.aspectRatio = String(Math.min(2.4, Math.max(0.6, data.aspects[index])));
    const address = source(index);
    if (address) {
      const image = make("img", { alt: "", loading: "lazy", decoding: "async" });
      image.src = address;
      box.append(image);
    } else box.append(make("span", { class: "blank" }, "no picture"));
    if (mark) box.append(make("span", { class: "mark" }, mark));
    return box;
  };

  // Which queries are shown
  const OUTCOMES = { right: "right", rescued: "rescued by re-ranking", lost: "lost by re-ranking", wrong: "wrong", none: "no match" };
  const answerDistance = (query) => data.candidates[query][last].length ? data.candidates[query][last][0][3] ?? 0 : 0;
  const isWrong = (query) => outcomes[query] === "wrong" || outcomes[query] === "lost";
  const filters = [["all", "All", () => true]];
  if (judged) {
    if (last > 0) filters.push(["rescued", "Rescued", (q) => outcomes[q] === "rescued"], ["lost", "Lost", (q) => outcomes[q] === "lost"]);
    filters.push(["worst", "Worst errors", isWrong], ["none", "No match", (q) => outcomes[q] === "none"],
      ["right", "Right", (q) => outcomes[q] === "right" || outcomes[q] === "rescued"]);
  }
  const orders = [["list", "in the list's order"]];
  if (judged) orders.push(["far", "farthest answer first"], ["rank", "latest match first"]);
  orders.push(["name", "by name"]);
  const lowered = data.queries.map((name) => name.toLowerCase());
  const all = Array.from({ length: numQueries }, (_, index) => index);
  let filter = "all", shown = [], drawn = 0;

  const list = byId("list"), search = byId("search"), order = byId("order");
  for (const [key, label] of orders) order.append(make("option", { value: key }, label));
  filters.forEach(([key, label, test], number) => {
    const button = make("button", { type: "button", "data-filter": key, "aria-pressed": "false", title: `key ${number + 1}` },
      label, make("span", {}, count(all.filter(test).length)));
    button.addEventListener("click", () => choose(key));
    byId("filters").append(button);
  });

  function choose(key) {
    filter = key;
    order.value = key === "worst" ? "far" : "list";
    update();
  }

  function update() {
    const test = filters.find(([key]) => key === filter)[2];
    const wanted = search.value.trim().toLowerCase();
    shown = all.filter((query) => test(query) && (!wanted || lowered[query].includes(wanted) ||
      data.candidates[query].some((stage) => stage.some(([place]) => data.database[place].toLowerCase().includes(wanted)))));
    const late = (query) => { const rank = data.ranks[query][last]; return outcomes[query] === "none" ? -1 : rank || 1e9; };
    if (order.value === "far") shown.sort((a, b) => answerDistance(b) - answerDistance(a) || a - b);
    if (order.value === "rank") shown.sort((a, b) => late(b) - late(a) || a - b);
    if (order.value === "name") shown.sort((a, b) => lowered[a] < lowered[b] ? -1 : lowered[a] > lowered[b] ? 1 : a - b);
    for (const button of byId("filters").children) button.setAttribute("aria-pressed", String(button.dataset.filter === filter));
    byId("count").textContent = (shown.length === numQueries ? "" : `${count(shown.length)} of `) + counted(numQueries, "query", "queries");
    list.replaceChildren();
    drawn = 0;
    grow();
  }

  function grow(least = 0) {
    const end = Math.min(shown.length, Math.max(drawn + BATCH, least));
    const part = document.createDocumentFragment();
    for (; drawn < end; drawn++) part.append(card(shown[drawn]));
    list.append(part);
  }
  new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting) && drawn < shown.length) {
      grow();
      watchMore();
    }
  }, { rootMargin: "1500px" }).observe(byId("more"));
  function watchMore() { // the observer tells only of changes
    requestAnimationFrame(() => {
      if (drawn < shown.length && byId("more").getBoundingClientRect().top < innerHeight + 1500) { grow(); watchMore(); }
    });
  }

  function shot(query, candidate, text) {
    const [place, score, right, far] = candidate;
    const kind = right === null ? "" : right ? "right" : "wrong";
    const name = data.database[place];
    const button = make("button", { type: "button", class: `shot ${kind}`, title: score === null ? name : `${name}\nscore ${score}`,
      "aria-label": `${text} ${name}${kind ? ", " + kind : ""}` }, frame(numQueries + place, kind === "right" ? "✓" : kind ? "✗" : ""));
    if (data.matches[`${query}:${place}`]) button.classList.add("has-matches");
    const parts = [distance(far), text].filter(Boolean).join(" · ");
    if (parts) button.append(make("span", { class: "under" }, parts));
    button.addEventListener("click", () => openPair(query, place));
    return button;
  }

  function card(query) {
    const about = make("div", { class: "about" });
    const own = make("div", { class: "shot" }, frame(query, ""));
    about.append(own, make("div", { class: "name" }, data.queries[query]));
    if (judged) {
      about.append(make("span", { class: `outcome ${outcomes[query]}` }, OUTCOMES[outcomes[query]]));
      const example = data.examples[query];
      const visible = example && data.candidates[query][last].some(([place]) => place === example[0]);
      if (example && !visible && isWrong(query)) {
        const target = make("div", { class: "target" }, shot(query, example, "nearest match"));
        about.append(target);
      }
    }
    const rows = make("div", { class: "rows" });
    data.candidates[query].forEach((candidates, stage) => {
      const label = make("div", { class: "label" }, make("b", {}, data.stages[stage]));
      if (judged && outcomes[query] !== "none") {
        const rank = data.ranks[query][stage];
        label.append(rank ? `match at rank ${rank}` : "no match found");
      }
      const row = make("div", { class: "row" }, label);
      candidates.forEach((candidate) => {
        const before = stage > 0 ? data.candidates[query][0].findIndex(([place]) => place === candidate[0]) : -1;
        row.append(shot(query, candidate, stage === 0 ? "" : before < 0 ? "new" : `was ${before + 1}`));
      });
      rows.append(row);
    });
    const element = make("article", { class: "query", tabindex: "0", "data-query": query, "aria-label": data.queries[query] }, about, rows);
    element.query = query;
    return element;
  }

  // The figure of a pair: pictures side by side at their own aspect and one height
  const dialog = byId("pair"), figure = byId("pair-figure");
  let current = null, hidden = new Set(), outliers = true;
  function choices(query) {
    const places = [];
    for (const stage of [...data.candidates[query]].reverse()) for (const [place] of stage) if (!places.includes(place)) places.push(place);
    if (judged && data.examples[query] && !places.includes(data.examples[query][0])) places.push(data.examples[query][0]);
    return places;
  }
  function openPair(query, place) {
    current = { query, place };
    hidden = new Set();
    drawPair();
    if (!dialog.open) dialog.showModal();
  }
  function decode(text) {
    const raw = atob(text);
    return Uint8Array.from(raw, (letter) => letter.charCodeAt(0));
  }
  function candidateOf(query, place) {
    const stages = [...data.candidates[query]].reverse();
    for (const stage of stages) for (const candidate of stage) if (candidate[0] === place) return candidate;
    return judged && data.examples[query] && data.examples[query][0] === place ? data.examples[query] : null;
  }
  function drawPair() {
    const { query, place } = current;
    const height = 300, gap = 8;
    const widths = [query, numQueries + place].map((index) => data.aspects[index] * height);
    figure.setAttribute("viewBox", `0 0 ${widths[0] + gap + widths[1]} ${height}`);
    figure.replaceChildren();
    const candidate = candidateOf(query, place);
    [query, numQueries + place].forEach((index, side) => {
      const x = side ? widths[0] + gap : 0;
      const address = source(index);
      if (address) figure.append(svg("image", { href: address, x, y: 0, width: widths[side], height, preserveAspectRatio: "none" }));
      else figure.append(svg("text", { x: x + widths[side] / 2, y: height / 2, "text-anchor": "middle", fill: "currentColor" }, "no picture"));
    });
    if (candidate && candidate[2] !== null) figure.append(svg("rect", { x: widths[0] + gap + 1.5, y: 1.5, width: widths[1] - 3, height: height - 3, fill: "none",
      style: `stroke: var(--${candidate[2] ? "right" : "wrong"})`, "stroke-width": 3 }));
    const verdict = !candidate || candidate[2] === null ? "" : candidate[2] ? " ✓" : " ✗";
    byId("pair-title").textContent = `${data.queries[query]}  ↔  ${data.database[place]}${verdict}${candidate && candidate[3] !== null ? "  " + distance(candidate[3]) : ""}`;
    const scales = data.matches[`${query}:${place}`] || [];
    const legend = byId("pair-scales");
    legend.replaceChildren();
    const total = scales.reduce((sum, scale) => sum + scale[3], 0);
    const stroke = Math.min(1.3, Math.max(0.45, 120 / Math.max(1, total)));
    const under = svg("g"), over = svg("g");
    figure.append(under, over);
    scales.forEach(([side, score, numMatches, numInliers, packed], number) => {
      const colour = data.colours[number % data.colours.length];
      const swatch = make("i");
      swatch.style.background = colour;
      const button = make("button", { type: "button", "aria-pressed": String(!hidden.has(number)) }, swatch,
        `${side}×${side}: ${counted(numInliers, "inlier", "inliers")} of ${counted(numMatches, "match", "matches")}, score ${score}`);
      button.addEventListener("click", () => { hidden.has(number) ? hidden.delete(number) : hidden.add(number); drawPair(); });
      legend.append(button);
      if (hidden.has(number)) return;
      const positions = decode(packed);
      let fine = "", faint = "";
      for (let at = 0; at * 4 < positions.length; at++) {
        const [x1, y1, x2, y2] = positions.subarray(at * 4, at * 4 + 4);
        const ends = [x1 / 255 * widths[0], y1 / 255 * height, widths[0] + gap + x2 / 255 * widths[1], y2 / 255 * height].map((v) => v.toFixed(1));
        const path = `M${ends[0]} ${ends[1]}L${ends[2]} ${ends[3]}`;
        if (at < numInliers) {
          fine += path;
          for (const [x, y] of [[ends[0], ends[1]], [ends[2], ends[3]]])
            over.append(svg("circle", { cx: x, cy: y, r: 1 + stroke, fill: colour, stroke: "#202020", "stroke-width": 0.4 }));
        } else if (outliers) faint += path;
      }
      under.prepend(svg("path", { d: faint, class: "outlier", "stroke-width": 0.5 }));
      under.append(svg("path", { d: fine, stroke: colour, "stroke-width": stroke, "stroke-opacity": 0.6, class: "inlier" }));
    });
    const note = byId("pair-note");
    note.replaceChildren();
    if (scales.length) {
      const toggle = make("button", { type: "button", "aria-pressed": String(outliers), id: "outliers" }, "Outliers");
      toggle.addEventListener("click", () => { outliers = !outliers; drawPair(); });
      legend.append(toggle);
    } else note.append("Matches of this pair are not stored in the page; see them with ",
      make("code", {}, `match_two.py --first_im_path ${quoted(data.queries[query])} --second_im_path ${quoted(data.database[place])}`),
      " from the dataset's folder.");
  }
  function step(by) {
    const places = choices(current.query);
    const at = (places.indexOf(current.place) + by + places.length) % places.length;
    current.place = places[at];
    drawPair();
  }
  byId("before").addEventListener("click", () => step(-1));
  byId("after").addEventListener("click", () => step(1));
  for (const some of document.querySelectorAll("dialog")) {
    some.querySelector(".close").addEventListener("click", () => some.close());
    some.addEventListener("click", (event) => { if (event.target === some) some.close(); });
  }
  byId("help").addEventListener("click", () => byId("keys").showModal());

  // Keys
  function focusQuery(position) {
    if (!shown.length) return;
    const at = Math.max(0, Math.min(shown.length - 1, position));
    if (at >= drawn) grow(at + 1);
    const element = list.children[at];
    element.focus({ preventScroll: true });
    element.scrollIntoView({ block: "nearest" });
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (dialog.open) {
      if (event.key === "ArrowRight") step(1);
      else if (event.key === "ArrowLeft") step(-1);
      else if (event.key === "o") { outliers = !outliers; drawPair(); }
      else return;
      event.preventDefault();
      return;
    }
    if (byId("keys").open) return;
    if (event.target === search || event.target === order) {
      if (event.key === "Escape") { search.blur(); order.blur(); }
      return;
    }
    const card = document.activeElement.closest(".query");
    const at = card ? [...list.children].indexOf(card) : -1;
    if (event.key === "j") focusQuery(at + 1);
    else if (event.key === "k") focusQuery(at - 1);
    else if (event.key === "/") search.focus();
    else if (event.key === "?") byId("keys").showModal();
    else if (event.key === "Enter" && card && document.activeElement === card) {
      const first = data.candidates[card.query][last][0];
      if (first) openPair(card.query, first[0]);
    } else if (/^[1-9]$/.test(event.key) && filters[event.key - 1]) choose(filters[event.key - 1][0]);
    else return;
    event.preventDefault();
  });
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(update, 120); });
  order.addEventListener("change", update);

  // Charts
  const charts = byId("charts");
  const WIDTH = 360, HEIGHT = 220, LEFT = 34, RIGHT = 16, TOP = 8, BOTTOM = 34;
  const STAGE = ["var(--stage0)", "var(--stage1)"];
  function chart(title, legend) {
    const box = make("div", { class: "chart" }, make("h2", {}, title));
    const canvas = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
    box.append(canvas);
    if (legend) box.append(legendOf(legend));
    charts.append(box);
    return canvas;
  }
  function legendOf(entries) {
    const legend = make("div", { class: "legend" });
    for (const [label, colour] of entries) {
      const dot = make("i");
      dot.style.background = colour;
      legend.append(make("span", {}, dot, label));
    }
    return legend;
  }
  function axes(canvas, xTicks, yTicks, x, y, xLabel) {
    for (const [value, label] of yTicks) canvas.append(
      svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), class: "grid" }),
      svg("text", { x: LEFT - 5, y: y(value) + 4, "text-anchor": "end" }, label));
    for (const [value, label] of xTicks) canvas.append(svg("text", { x: x(value), y: HEIGHT - BOTTOM + 14, "text-anchor": "middle" }, label));
    canvas.append(svg("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, xLabel));
  }
  const line = (points) => points.map(([x, y], at) => `${at ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  function hover(canvas, describe) {
    const tip = make("div", { class: "tip", hidden: "" });
    canvas.parentNode.append(tip);
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect(), outer = canvas.parentNode.getBoundingClientRect();
      const text = describe((event.clientX - box.left) / box.width * WIDTH, (event.clientY - box.top) / box.height * HEIGHT);
      tip.hidden = !text;
      tip.textContent = text || "";
      tip.style.left = Math.max(0, Math.min(outer.width - tip.offsetWidth - 4, event.clientX - outer.left + 10)) + "px";
      tip.style.top = event.clientY - outer.top - 30 + "px";
    });
    canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
  const percent = (value) => (100 * value).toFixed(1) + " %";
  const stageLegend = () => data.stages.map((stage, at) => [stage, STAGE[at]]);

  function recallChart() {
    const curves = data.curves.recall;
    const canvas = chart("Recall@N, with 95 % confidence", stageLegend());
    const most = Math.max(2, ...Object.values(curves).map((points) => points[points.length - 1][0]));
    const lowest = Math.floor(10 * Math.min(...Object.values(curves).map((points) => points[0][2]))) / 10;
    const x = (n) => LEFT + Math.log(n) / Math.log(most) * (WIDTH - LEFT - RIGHT);
    const y = (value) => TOP + (1 - value) / (1 - lowest || 1) * (HEIGHT - TOP - BOTTOM);
    const step = 1 - lowest > 0.5 ? 0.2 : 0.1;
    const ticks = [];
    for (let value = 1; value >= lowest - 1e-9; value -= step) ticks.push([value, Math.round(100 * value)]);
    axes(canvas, [1, 2, 5, 10, 20, 50, 100, 1000].filter((n) => n <= most).map((n) => [n, n]), ticks, x, y, "N");
    data.stages.forEach((stage, at) => {
      const points = curves[stage];
      const band = [...points.map((p) => [x(p[0]), y(p[3])]), ...[...points].reverse().map((p) => [x(p[0]), y(p[2])])];
      canvas.append(svg("path", { d: line(band) + "Z", style: `fill: ${STAGE[at]}`, opacity: 0.16 }),
        svg("path", { d: line(points.map((p) => [x(p[0]), y(p[1])])), class: "curve", style: `stroke: ${STAGE[at]}` }));
    });
    hover(canvas, (px) => {
      const n = Math.round(Math.exp((px - LEFT) / (WIDTH - LEFT - RIGHT) * Math.log(most)));
      if (n < 1 || n > most) return "";
      return `@${n}: ` + data.stages.map((stage) => {
        const point = [...curves[stage]].reverse().find((p) => p[0] <= n) || curves[stage][0];
        return `${stage} ${percent(point[1])}`;
      }).join(", ");
    });
  }
  function precisionChart() {
    const stages = data.stages.filter((stage) => data.curves.precision[stage]);
    if (!stages.length) return;
    const canvas = chart("Precision over recall of the best answer", stages.map((stage) => [stage, STAGE[data.stages.indexOf(stage)]]));
    const x = (value) => LEFT + value * (WIDTH - LEFT - RIGHT);
    const y = (value) => TOP + (1 - value) * (HEIGHT - TOP - BOTTOM);
    const ticks = [0, 0.25, 0.5, 0.75, 1].map((value) => [value, 100 * value]);
    axes(canvas, ticks, ticks, x, y, "recall (%), as the confidence asked for falls");
    for (const stage of stages) canvas.append(svg("path", { d: line(data.curves.precision[stage].map(([r, p]) => [x(r), y(p)])), class: "curve",
      style: `stroke: ${STAGE[data.stages.indexOf(stage)]}` }));
    hover(canvas, (px) => {
      const wanted = (px - LEFT) / (WIDTH - LEFT - RIGHT);
      if (wanted < 0 || wanted > 1) return "";
      return `recall ${percent(wanted)}: ` + stages.map((stage) => {
        const point = data.curves.precision[stage].find((p) => p[0] >= wanted);
        return `${stage} ${point ? percent(point[1]) : "–"}`;
      }).join(", ");
    });
  }
  function confidenceChart(stage) {
    const { label, edges, right, wrong } = data.curves.confidence[stage];
    const canvas = chart(`${stage}: ${label} of answers`, [["right", "var(--right)"], ["wrong", "var(--wrong)"]]);
    const low = edges[0], high = edges[edges.length - 1];
    const most = Math.max(1, ...right, ...wrong);
    const x = (value) => LEFT + (value - low) / (high - low || 1) * (WIDTH - LEFT - RIGHT);
    const y = (value) => TOP + (1 - value / most) * (HEIGHT - TOP - BOTTOM);
    const ticks = [0, 0.5, 1].map((share) => Math.round(share * most));
    const decimals = Math.max(0, Math.min(8, 2 - Math.floor(Math.log10(high - low || 1))));
    const labels = [0, 0.25, 0.5, 0.75, 1].map((share) => low + share * (high - low));
    axes(canvas, labels.map((value) => [value, String(+value.toFixed(decimals))]), [...new Set(ticks)].map((value) => [value, count(value)]), x, y, label);
    for (const [counts, kind] of [[right, "right"], [wrong, "wrong"]]) {
      const points = [[x(low), y(0)]];
      counts.forEach((value, bin) => points.push([x(edges[bin]), y(value)], [x(edges[bin + 1]), y(value)]));
      points.push([x(high), y(0)]);
      canvas.append(svg("path", { d: line(points), style: `fill: var(--${kind}); stroke: var(--${kind})`, "fill-opacity": 0.28, "stroke-width": 1.4 }));
    }
    hover(canvas, (px) => {
      const bin = edges.findIndex((edge, at) => px >= x(edge) && px < x(edges[at + 1]));
      return bin < 0 || bin >= right.length ? "" : `${+edges[bin].toPrecision(4)}: ${right[bin]} right, ${wrong[bin]} wrong`;
    });
  }
  function mapChart() {
    const { queries, database } = data.map;
    const points = [...queries, ...database];
    let [left, bottom, right, top] = [Infinity, Infinity, -Infinity, -Infinity];
    for (const [x, y] of points) { left = Math.min(left, x); right = Math.max(right, x); bottom = Math.min(bottom, y); top = Math.max(top, y); }
    const kinds = ["right", "rescued", "lost", "wrong", "none"].filter((kind) => outcomes.includes(kind));
    const box = make("div", { class: "chart wide" }, make("h2", {}, "Map of the queries"));
    charts.append(box);
    const shape = box.clientWidth > 500 ? 3.2 : 1.6; // width / height
    const half = [HEIGHT * shape, HEIGHT]; // of the canvas, in its pixels
    const canvas = make("canvas", { width: 2 * half[0], height: 2 * half[1], id: "map", role: "img", "aria-label": "Map of the queries by outcome; click one to see it" });
    canvas.style.cursor = "pointer";
    box.append(canvas, legendOf([...kinds.map((kind) => [OUTCOMES[kind], `var(--${kind})`]), ["database", "var(--line)"]]));
    const margin = 24, width = right - left || 1, height = top - bottom || 1;
    const scale = Math.min((2 * half[0] - 2 * margin) / width, (2 * HEIGHT - 2 * margin - 24) / height);
    const place = ([x, y]) => [half[0] + (x - left - width / 2) * scale, HEIGHT - 12 - (y - bottom - height / 2) * scale];
    const radius = Math.max(3, Math.min(9, 220 / Math.sqrt(numQueries)));
    function draw() {
      const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
      const colour = (name) => style.getPropertyValue(name).trim();
      pen.clearRect(0, 0, canvas.width, canvas.height);
      pen.fillStyle = colour("--none");
      pen.globalAlpha = 0.35;
      for (const point of database) { const [x, y] = place(point); pen.fillRect(x - 2, y - 2, 4, 4); }
      pen.globalAlpha = 0.85;
      for (const kind of kinds) { // rarer outcomes over the common one
        pen.fillStyle = colour(`--${kind}`);
        queries.forEach((point, query) => {
          if (outcomes[query] !== kind) return;
          const [x, y] = place(point);
          pen.beginPath();
          pen.arc(x, y, kind === "right" ? radius * 0.8 : radius, 0, 7);
          pen.fill();
        });
      }
      pen.globalAlpha = 1;
      const nice = [1, 2, 5].flatMap((m) => [...Array(9).keys()].map((e) => m * 10 ** (e - 2))).filter((v) => v * scale < 260).sort((a, b) => b - a)[0];
      if (nice) {
        pen.fillStyle = colour("--soft");
        pen.fillRect(margin, 2 * HEIGHT - 10, nice * scale, 3);
        pen.font = "22px sans-serif";
        pen.fillText(withUnit(+nice.toPrecision(3)), margin, 2 * HEIGHT - 18);
      }
    }
    draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * canvas.width, y = (event.clientY - box.top) / box.height * canvas.height;
      let best = -1, nearest = 900;
      queries.forEach((point, query) => {
        const [px, py] = place(point);
        const squared = (px - x) ** 2 + (py - y) ** 2;
        if (squared < nearest) { nearest = squared; best = query; }
      });
      if (best < 0) return;
      search.value = data.queries[best];
      choose("all");
      focusQuery(shown.indexOf(best));
    });
  }
  if (judged) {
    recallChart();
    precisionChart();
    for (const stage of data.stages) if (data.curves.confidence[stage]) confidenceChart(stage);
    if (data.map) mapChart();
  }
  update();
})();
