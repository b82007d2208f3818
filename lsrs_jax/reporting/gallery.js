// The gallery: one page of cards at a time, cut out of the sheets of images.
const PER_PAGE = 60;
const SIZE = 104; // CSS pixels of an image, about

const sheetUrls = new Map();
let sheetFiles = null;

// The address of a sheet, made when it is first shown.
function sheetUrl(pictures, sheet) {
  const key = `${pictures} ${sheet}`;
  if (!sheetUrls.has(key)) {
    sheetFiles ??= JSON.parse(byId("sheets").textContent);
    const bytes = Uint8Array.from(atob(sheetFiles[pictures][sheet]), (character) => character.charCodeAt(0));
    const type = `image/${data.pictures[pictures].kind}`;
    sheetUrls.set(key, URL.createObjectURL(new Blob([bytes], { type })));
  }
  return sheetUrls.get(key);
}

// The picture at a place of the sheets of some pictures.
function picture(pictures, place, text) {
  const facts = data.pictures[pictures], cells = facts.columns * facts.rows;
  const scale = Math.max(1, Math.round(SIZE / Math.max(facts.width, facts.height))), within = place % cells;
  const node = make("div", { class: "picture", role: "img", "aria-label": text });
  const [across, down] = facts.pitch.map((pitch) => pitch * scale);
  Object.assign(node.style, {
    width: `${facts.width * scale}px`, height: `${facts.height * scale}px`,
    backgroundImage: `url("${sheetUrl(pictures, Math.floor(place / cells))}")`,
    backgroundSize: `${across * facts.columns}px ${down * facts.rows}px`,
    backgroundPosition: `${-across * (within % facts.columns)}px ${-down * Math.floor(within / facts.columns)}px`,
  });
  return node;
}

function outcome(gallery, item) {
  if (gallery.predict[item] < 0) return "abstained";
  return gallery.predict[item] === gallery.label[item] ? "correct" : "wrong";
}

function votes(gallery, item, name) {
  if (!gallery.votes || !gallery.samples[item]) return [];
  const total = gallery.samples[item];
  const parts = gallery.votes[item].map(([label, count]) => ({ label, share: count / total }));
  const percent = (share) => (share === 1 ? "100" : Math.min(99.9, 100 * share).toFixed(1));
  const seen = parts.filter(({ share }, rank) => !rank || share >= 0.001);
  const text = seen.map(({ label, share }) => `${name(label)}: ${percent(share)}\u00a0%`).join(", ");
  const bar = make("div", { class: "votes", role: "img", "aria-label": `of ${whole(total)} samples: ${text}` });
  parts.forEach(({ label, share }, rank) => {
    const part = make("span", { class: label === gallery.label[item] ? "true" : `other-${rank}` });
    part.style.width = `${100 * share}%`;
    bar.append(part);
  });
  return [bar, make("p", { class: "small" }, text)];
}

function flip(gallery, item, name) {
  if (!gallery.flips) return [];
  const distance = gallery.flips[item];
  if (distance === -1) return [make("p", { class: "small" }, "not attacked")];
  if (distance === null) return [make("p", { class: "small" }, "no attack flipped it")];
  const inside = gallery.predict[item] >= 0 && distance < gallery.radius[item];
  const to = gallery.flipped && gallery.flipped.predict[item];
  const there = to !== null && to >= 0 ? `, predicted there: ${name(to)}` : "";
  return [make("p", { class: inside ? "small alarm" : "small" },
    `${inside ? "FLIPPED INSIDE" : "nearest flip"} at ${brief(distance)}${there}`)];
}

function images(gallery, item, label) {
  const own = picture(gallery.pictures, gallery.place[item], `image ${gallery.idx[item]}, ${label}`);
  const place = gallery.flipped ? gallery.flipped.place[item] : -1;
  if (place < 0) return own;
  return make("div", { class: "pair" }, own,
    picture(gallery.flipped.pictures, place, `its nearest flip, at ${brief(gallery.flips[item])}`));
}

function card(run, item) {
  const gallery = run.gallery, names = data.pictures[gallery.pictures].classes;
  const name = (label) => names[label] ?? String(label), kind = outcome(gallery, item);
  const label = name(gallery.label[item]), predict = name(gallery.predict[item]);
  const answer = kind === "abstained" ? "abstained" : kind === "correct" ? `predicted ${predict}` : `wrong: ${predict}`;
  return make("li", { class: `card ${kind}` },
    images(gallery, item, label),
    make("p", {}, make("b", {}, label), make("span", { class: "number" }, `#${gallery.idx[item]}`)),
    make("p", { class: "answer" }, answer),
    make("p", { class: "small" }, kind === "abstained" ? "no radius" : `radius ${radius3(gallery.radius[item])}`),
    ...flip(gallery, item, name), ...votes(gallery, item, name));
}

function field(text, control) {
  return make("label", {}, text, control);
}

function select(options) {
  return make("select", {}, ...options.map(([value, text]) => make("option", { value }, text)));
}

const ORDERS = {
  index: () => (a, b) => a - b,
  up: (gallery) => (a, b) => gallery.radius[a] - gallery.radius[b],
  down: (gallery) => (a, b) => gallery.radius[b] - gallery.radius[a],
};

function stored(pictures) {
  const facts = data.pictures[pictures];
  return (facts.kind === "png" ? "stored without loss" : "stored as JPEG, with loss") +
    (facts.scaled ? `, scaled down to ${facts.width}×${facts.height} pixels.` : ".");
}

function describe(run) {
  const gallery = run.gallery;
  return [
    `Images of ${data.pictures[gallery.pictures].name}, ${stored(gallery.pictures)}`,
    gallery.every > 1 ? `Of all certified images, one in ${gallery.every}.` : "",
    gallery.votes ? "Bars: the share of the estimation samples of an image; blue is its label." : "",
    gallery.flips ? "Nearest flip: the ℓ2 distance of the nearest point at which an attack changed the class." : "",
    gallery.flipped ? "On the right: that point, with its pixels cut to the range that a picture can show, " +
      stored(gallery.flipped.pictures) : "",
  ].filter(Boolean).join(" ");
}

function gallery(home, runs) {
  const pick = {
    run: select(runs.map((run, k) => [k, run.cells[0].text])),
    outcome: select([["", "all"], ["correct", "correct"], ["wrong", "wrong"], ["abstained", "abstained"]]),
    label: select([]),
    from: make("input", { type: "number", min: 0, step: "any" }),
    to: make("input", { type: "number", min: 0, step: "any" }),
    order: select([["index", "image number"], ["up", "smallest radius first"], ["down", "largest radius first"]]),
  };
  const filters = make("form", { class: "controls filters", "aria-label": "Which images are shown" },
    field("Run", pick.run), field("Answer", pick.outcome), field("Label", pick.label),
    field("Radius from", pick.from), field("Radius to", pick.to), field("Order", pick.order));
  const about = make("p", { class: "hint" }), status = make("p", { role: "status" });
  const cards = make("ul", { class: "cards", "aria-label": "certified images" });
  const before = make("button", { type: "button" }, "Previous"), after = make("button", { type: "button" }, "Next");
  const number = make("input", { type: "number", min: 1, value: 1, "aria-label": "page" }), of = make("span");
  const pager = make("nav", { class: "pager", "aria-label": "pages of images" }, before, "page ", number, of, after);
  let page = 1, found = [];
  const run = () => runs[Number(pick.run.value)];

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    page = Math.min(Math.max(1, page), pages);
    const first = (page - 1) * PER_PAGE, items = found.slice(first, first + PER_PAGE);
    cards.replaceChildren(...items.map((item) => card(run(), item)));
    status.textContent = items.length
      ? `Images ${whole(first + 1)} to ${whole(first + items.length)} of ${whole(found.length)}.` : "No image fits.";
    number.value = page;
    number.max = pages;
    of.textContent = ` of ${whole(pages)} `;
    before.disabled = page === 1;
    after.disabled = page === pages;
  }
  function filter() {
    const own = run().gallery, from = Number(pick.from.value), to = pick.to.value === "" ? Infinity : Number(pick.to.value);
    const fits = (_, item) => (!pick.outcome.value || outcome(own, item) === pick.outcome.value) &&
      (pick.label.value === "" || own.label[item] === Number(pick.label.value)) &&
      own.radius[item] >= from && own.radius[item] <= to;
    found = own.idx.map((_, item) => item).filter((item) => fits(null, item)).sort(ORDERS[pick.order.value](own));
    page = 1;
    show();
  }
  function choose() {
    const own = run().gallery, names = data.pictures[own.pictures].classes, kept = pick.label.value;
    const labels = [...new Set(own.label)].sort((a, b) => a - b);
    const options = labels.map((label) => make("option", { value: label }, names[label] ?? String(label)));
    pick.label.replaceChildren(make("option", { value: "" }, "all"), ...options);
    pick.label.value = labels.includes(Number(kept)) ? kept : "";
    about.textContent = describe(run());
    cards.classList.toggle("pairs", Boolean(own.flipped));
    filter();
  }
  pick.run.addEventListener("change", choose);
  for (const name of ["outcome", "label", "from", "to", "order"]) pick[name].addEventListener("input", filter);
  filters.addEventListener("submit", (event) => event.preventDefault());
  before.addEventListener("click", () => { page -= 1; show(); });
  after.addEventListener("click", () => { page += 1; show(); });
  number.addEventListener("change", () => { page = Math.trunc(Number(number.value)) || 1; show(); });
  home.append(filters, about, status, cards, pager);
  choose();
}

function startGallery() {
  const runs = data.runs.filter((run) => run.gallery);
  byId("gallery").append(...list(data.lacking));
  if (runs.length) gallery(byId("gallery"), runs);
}
startGallery();
