(function () {
  "use strict";
  var tip = document.getElementById("tip");
  var levels = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
  function show(event, text) {
    tip.textContent = text;
    tip.hidden = false;
    var box = tip.getBoundingClientRect();
    var left = event.clientX + 14, top = event.clientY + 14;
    if (left + box.width > innerWidth - 6) left = event.clientX - box.width - 14;
    if (top + box.height > innerHeight - 6) top = event.clientY - box.height - 14;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = Math.max(4, top) + "px";
  }
  function digits(value) {
    var size = Math.abs(value);
    if (size >= 1e4) return Math.round(value).toLocaleString("en");
    return size !== 0 && size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));
  }
  // The point of a sorted list nearest to x.
  function nearest(points, x) {
    var low = 0, high = points.length - 1;
    while (high - low > 1) {
      var middle = (low + high) >> 1;
      if (points[middle][0] < x) low = middle; else high = middle;
    }
    return x - points[low][0] < points[high][0] - x ? points[low] : points[high];
  }
  document.querySelectorAll("svg[data-points]").forEach(function (svg) {
    var data = JSON.parse(document.getElementById(svg.dataset.points).textContent);
    var plot = svg.dataset.plot.split(",").map(Number);
    var cross = document.createElementNS("http://www.w3.org/2000/svg", "path");
    cross.setAttribute("class", "cross");
    svg.appendChild(cross);
    svg.addEventListener("pointermove", function (event) {
      var box = svg.getBoundingClientRect();
      var x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      var at = Math.min(Math.max((x - plot[0]) / (plot[1] - plot[0]), 0), 1) * data.steps;
      var main = nearest(data.lines[0].points, at);
      cross.setAttribute("d", "M" + (plot[0] + main[0] / data.steps * (plot[1] - plot[0])) + " " + plot[2] + "V" + plot[3]);
      var lines = data.lines.map(function (line) { return [line.name, nearest(line.points, at)]; });
      // Of many lines the highest and the lowest ones.
      var left = 0;
      if (lines.length > 12) {
        lines.sort(function (a, b) { return b[1][1] - a[1][1]; });
        left = lines.splice(5, lines.length - 10).length;
      }
      var rows = lines.map(function (line) {
        var point = line[1];
        var where = point[0] === main[0] ? "" : "  (step " + point[0].toLocaleString("en") + ")";
        return "\n" + line[0] + "  " + digits(point[1]) + where;
      });
      if (left) rows.splice(5, 0, "\n(" + left + " between)");
      show(event, "step " + main[0].toLocaleString("en") + rows.join(""));
    });
    svg.addEventListener("pointerleave", function () { tip.hidden = true; cross.removeAttribute("d"); });
  });
  document.querySelectorAll("svg[data-map]").forEach(function (svg) {
    var data = JSON.parse(document.getElementById(svg.dataset.map).textContent);
    svg.addEventListener("pointermove", function (event) {
      var box = svg.getBoundingClientRect();
      var inside = function (share, count) { return Math.min(Math.max(Math.floor(share * count), 0), count - 1); };
      var column = inside((event.clientX - box.left) / box.width, data.columns);
      var expert = inside((event.clientY - box.top) / box.height, data.experts);
      var level = levels.indexOf(data.cells[column * data.experts + expert]);
      var ratio = level === 0 ? 0 : Math.pow(2, (level - 1) / 6 - 5);
      var from = column * data.width, to = from + data.width - 1;
      var load = level === 0 ? "no tokens" :
        "about " + ratio.toPrecision(2) + "× balanced, " + (100 * ratio / data.experts).toPrecision(2) + "% of tokens";
      show(event, "expert " + expert + "\nstep" + (to > from ? "s " + from.toLocaleString("en") + "–" : " ") +
        to.toLocaleString("en") + "\n" + load);
    });
    svg.addEventListener("pointerleave", function () { tip.hidden = true; });
  });
})();
