/* Two viewers that move as one, their overlays and the swipe. Files on disk only: no requests. */
(function () {
  "use strict";

  const data = JSON.parse(document.getElementById("data").textContent);
  const stage = document.getElementById("stage");
  const at = (id) => document.getElementById(id);
  const svg = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const widthOut = data.width * data.reduction; // px of the virtual slide across the picture
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  const panes = ["he", "ihc"].map(makePane);
  let leader = panes[0];
  let isWhole = true; // until someone moves or zooms: a new window size then shows the whole slide again

  function makePane(stain) {
    const pane = at(stain);
    const view = document.createElement("div");
    view.className = "view";
    pane.prepend(view);
    const viewer = OpenSeadragon({
      element: view,
      drawer: "canvas", // WebGL may not draw pictures that come from the disk
      showNavigationControl: false,
      animationTime: calm ? 0 : 0.4,
      blendTime: 0,
      visibilityRatio: 0.4,
      minZoomImageRatio: 0.7,
      maxZoomPixelRatio: 4 * data.reduction,
      gestureSettingsMouse: { clickToZoom: false },
      tileSources: {
        width: data.width,
        height: data.height,
        tileSize: data.tile,
        tileOverlap: 0,
        minLevel: 0,
        maxLevel: data.levels - 1,
        getTileUrl: (level, x, y) => `${stain}/${level}/${x}_${y}.jpg`,
      },
    });
    viewer.canvas.setAttribute("aria-label", `${pane.getAttribute("aria-label")}: arrow keys move, plus and minus zoom`);
    viewer.canvas.setAttribute("role", "application");
    const made = { stain, pane, viewer, drawing: draw(pane), rasters: {}, fields: [], showsFields: false };
    for (const event of ["canvas-press", "canvas-scroll", "canvas-pinch", "canvas-key"]) {
      viewer.addHandler(event, () => { leader = made; isWhole = false; });
    }
    viewer.addHandler("open", () => addPictures(made));
    viewer.addHandler("viewport-change", () => { if (made === leader) follow(); });
    viewer.addHandler("update-viewport", () => place(made));
    // The viewer restores its zoom right after this event, so wait until it is through.
    viewer.addHandler("after-resize", () => queueMicrotask(() => {
      if (isWhole) viewer.viewport.goHome(true);
    }));
    return made;
  }

  /* Fields in full resolution lie over a reduced slide; the overlay lies over both. */
  function addPictures(made) {
    if (data.reduction > 1) {
      for (const field of data.fields) {
        const [x, y, width] = field.box;
        made.viewer.addSimpleImage({
          url: field[made.stain], x: x / widthOut, y: y / widthOut, width: width / widthOut, opacity: 0,
          success: (event) => { made.fields.push(event.item); showFields(made, made.showsFields); },
        });
      }
    }
    for (const { name, width } of data.rasters) {
      made.viewer.addSimpleImage({
        url: `${name}.png`, x: 0, y: 0, width, opacity: 0,
        success: (event) => { made.rasters[name] = event.item; showRasters(); },
      });
    }
  }

  function showFields(made, isClose) {
    made.showsFields = isClose;
    for (const item of made.fields) item.setOpacity(isClose ? 1 : 0);
  }

  function draw(pane) {
    const root = svg("svg", { "aria-hidden": "true" });
    const tissue = svg("g", { class: "layer-tissue" });
    const path = data.tissue.join("");
    tissue.append(svg("path", { d: path, class: "halo" }), svg("path", { d: path, class: "outline" }));
    const doubts = svg("g", { class: "layer-doubts" });
    for (const [x, y, width, height] of data.doubts) doubts.append(svg("rect", { x, y, width, height, class: "doubt" }));
    const spot = svg("g", { class: "layer-spot" });
    if (data.hot_spot) {
      const [cx, cy, r] = data.hot_spot;
      spot.append(svg("circle", { cx, cy, r, class: "halo" }), svg("circle", { cx, cy, r, class: "spot" }));
    }
    root.append(tissue, doubts, spot);
    pane.append(root);
    return { root, tissue, doubts, spot };
  }

  function follow() {
    const from = leader.viewer.viewport;
    for (const { viewer } of panes) {
      if (viewer === leader.viewer || !viewer.isOpen()) continue;
      viewer.viewport.zoomTo(from.getZoom(true), null, true);
      viewer.viewport.panTo(from.getCenter(true), true);
    }
  }

  function place(made) {
    const { pane, viewer, drawing } = made;
    if (!viewer.isOpen()) return;
    const viewport = viewer.viewport;
    const corner = viewport.pixelFromPoint(new OpenSeadragon.Point(0, 0), true);
    const perOut = (viewport.getContainerSize().x * viewport.getZoom(true)) / widthOut; // CSS px per out px
    const transform = `translate(${corner.x} ${corner.y}) scale(${perOut})`;
    drawing.tissue.setAttribute("transform", transform);
    drawing.doubts.setAttribute("transform", transform);
    drawing.spot.setAttribute("transform", transform);
    // Far away the whole slide is sharper: a field would be shrunk without smoothing.
    const isClose = perOut * data.reduction > 1;
    if (isClose !== made.showsFields) showFields(made, isClose);
    drawScale(pane.querySelector(".scale"), data.mpp / perOut);
  }

  /* The longest of 1, 2, 5 times a power of ten that stays under 140 CSS px. */
  function drawScale(element, umPerPx) {
    const most = 140 * umPerPx;
    const ten = 10 ** Math.floor(Math.log10(most));
    const um = ten * (most >= 5 * ten ? 5 : most >= 2 * ten ? 2 : 1);
    const text = um >= 1000 ? `${um / 1000} mm` : `${um} µm`;
    if (element.dataset.text !== text) {
      element.replaceChildren(document.createElement("i"), text);
      element.dataset.text = text;
    }
    element.firstChild.style.width = `${um / umPerPx}px`;
  }

  function showRasters() {
    for (const { rasters } of panes) {
      for (const [name, item] of Object.entries(rasters)) item.setOpacity(at(`show-${name}`).checked ? 0.75 : 0);
    }
  }

  function showLayers() {
    for (const { drawing } of panes) {
      drawing.tissue.style.display = at("show-tissue").checked ? "" : "none";
      drawing.doubts.style.display = at("show-doubts").checked ? "" : "none";
      drawing.spot.style.display = at("show-spot")?.checked ? "" : "none";
    }
  }

  function setMode(isSwipe) {
    stage.classList.toggle("swipe", isSwipe);
    at("swipe").setAttribute("aria-pressed", String(isSwipe));
    at("beside").setAttribute("aria-pressed", String(!isSwipe));
  }

  function lead(action, showsWhole = false) {
    leader = panes[0];
    isWhole = showsWhole;
    const viewport = leader.viewer.viewport;
    action(viewport);
    viewport.applyConstraints();
  }

  at("beside").addEventListener("click", () => setMode(false));
  at("swipe").addEventListener("click", () => setMode(true));
  at("closer").addEventListener("click", () => lead((viewport) => viewport.zoomBy(1.6)));
  at("wider").addEventListener("click", () => lead((viewport) => viewport.zoomBy(1 / 1.6)));
  at("whole").addEventListener("click", () => lead((viewport) => viewport.goHome(), true));
  at("show-tissue").addEventListener("change", showLayers);
  at("show-doubts").addEventListener("change", showLayers);
  at("show-spot")?.addEventListener("change", showLayers);
  for (const { name } of data.rasters) at(`show-${name}`).addEventListener("change", showRasters);
  at("cut").addEventListener("input", (event) => stage.style.setProperty("--cut", event.target.value / 1000));
  /* Show a box of the virtual slide, with `margin` times its side around it. */
  function show(box, margin) {
    const [x, y, width, height] = box.map((value) => value / widthOut);
    const rect = new OpenSeadragon.Rect(x - margin * width, y - margin * height, (1 + 2 * margin) * width, (1 + 2 * margin) * height);
    lead((viewport) => viewport.fitBounds(rect));
    stage.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "center" });
  }

  for (const button of document.querySelectorAll("[data-field]")) {
    button.addEventListener("click", () => show(data.fields[Number(button.dataset.field)].box, 0));
  }
  for (const button of document.querySelectorAll("[data-place]")) {
    button.addEventListener("click", () => {
      at("show-doubts").checked = true;
      showLayers();
      show(data.doubts[Number(button.dataset.place)], 0.5);
    });
  }
  window.report = { viewers: panes.map(({ viewer }) => viewer) }; // for a look from the console
  // A browser may restore ticks and the slider when the page is loaded again.
  stage.style.setProperty("--cut", at("cut").value / 1000);
  showLayers();
})();
