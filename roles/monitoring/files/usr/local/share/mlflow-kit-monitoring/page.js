// How the site is: figures and alerts from Prometheus' query interface, which the gateway lets through for reading.

const RANGES = { '15 min': 900, '1 h': 3600, '6 h': 21600, '24 h': 86400, '7 d': 604800, '30 d': 2592000 };
const REFRESH = 30;
const COLORS = {
  light: ['#1f6feb', '#d9730d', '#1a8f5a', '#a442c4', '#c4232e', '#0f8b9d', '#8a6d00', '#e0569b', '#5b6675', '#4c3fd1', '#6b9b1f', '#9c5a3c'],
  dark: ['#6ea8fe', '#ffa657', '#57c98b', '#d49bf0', '#ff7b81', '#56d4e2', '#e3c64b', '#ff9bce', '#a9b4c4', '#a59bff', '#a8d95b', '#d9a58b'],
};
// What has a meaning keeps its colour.
const MEANT = {
  light: { '5xx': '#c4232e', '4xx': '#d9730d', '2xx': '#1a8f5a', '3xx': '#1f6feb', paused: '#5b6675', limit: '#c4232e', 'there is': '#5b6675' },
  dark: { '5xx': '#ff7b81', '4xx': '#ffa657', '2xx': '#57c98b', '3xx': '#6ea8fe', paused: '#a9b4c4', limit: '#ff7b81', 'there is': '#a9b4c4' },
};
const byId = (id) => document.getElementById(id);
const state = { range: 3600, from: null, to: null, site: { scrape_seconds: 15 }, panels: [], held: null, timer: 0, busy: false };

function element(name, attributes = {}, ...content) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined) made.setAttribute(key, value);
  }
  made.append(...content);
  return made;
}

function number(value, digits = 3) {
  if (value === 0) return '0';
  const size = Math.floor(Math.log10(Math.abs(value)));
  return value.toFixed(Math.min(Math.max(digits - 1 - size, 0), 6)).replace(/(\.\d*?)0+$/, '$1').replace(/\.$/, '');
}

// A value and its unit, as a person writes them.
function parts(value, unit) {
  if (value === null || value === undefined || Number.isNaN(value)) return ['–', ''];
  const size = Math.abs(value);
  if (unit === 's') {
    if (size === 0) return ['0', 's'];
    if (size < 0.001) return [number(value * 1e6, 2), 'µs'];
    if (size < 1) return [number(value * 1e3), 'ms'];
    return size < 120 ? [number(value), 's'] : [number(value / 60), 'min'];
  }
  if (unit === 'B' || unit === 'B/s') {
    const names = ['B', 'kB', 'MB', 'GB', 'TB'];
    const power = size < 1 ? 0 : Math.min(Math.floor(Math.log10(size) / 3), 4);
    return [number(value / 1000 ** power), names[power] + unit.slice(1)];
  }
  if (unit === '%' || unit === 'h' || unit === 'd') return [number(value, size >= 100 ? 3 : 2), unit];
  if (size >= 1e6) return [number(value / 1e6), `M${unit}`];
  if (size >= 1e4) return [number(value / 1e3), `k${unit}`];
  return [number(value), unit];
}

const written = (value, unit) => parts(value, unit).join(unit === '%' ? ' ' : ' ').trim();

async function ask(path, parameters) {
  const answer = await fetch(`api/v1/${path}?${new URLSearchParams(parameters)}`, { credentials: 'same-origin' });
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok || found.status !== 'success') {
    throw new Error(found.error || (answer.status >= 500 ? 'Prometheus does not answer' : `the gateway answers ${answer.status}`));
  }
  return found.data;
}

// Rates need four scrapes at least, and no less than a step, or bursts fall between two points.
const rated = (query, step) => query.replaceAll('$rate', `${Math.max(4 * state.site.scrape_seconds, step)}s`);

async function now(query) {
  const found = await ask('query', { query: rated(query, 300) });
  return found.result.length ? Number(found.result[0].value[1]) : null;
}

const dark = () => document.documentElement.dataset.theme === 'dark';

function colors(names) {
  const kind = dark() ? 'dark' : 'light';
  let next = 0;
  return names.map((name) => MEANT[kind][name] || COLORS[kind][next++ % COLORS[kind].length]);
}

function span() {
  const to = state.to || Date.now() / 1000;
  const from = state.from || to - state.range;
  const step = Math.max(Math.ceil((to - from) / 240), Math.min(state.site.scrape_seconds, 15));
  return { from: Math.floor(from / step) * step, to: Math.floor(to / step) * step, step };
}

function label(legend, metric) {
  return legend.replace(/\{(\w+)\}/g, (_, name) => metric[name] || '');
}

async function series(panel, when) {
  const answers = await Promise.all(panel.queries.map((one) => ask('query_range', {
    query: rated(one.query, when.step), start: when.from, end: when.to, step: when.step,
  })));
  const names = [];
  const columns = [];
  answers.forEach((answer, index) => {
    for (const one of answer.result) {
      names.push(label(panel.queries[index].legend, one.metric));
      columns.push(new Map(one.values.map(([time, value]) => [time, Number(value)])));
    }
  });
  const order = names.map((_, index) => index);
  if (panel.queries.length === 1) order.sort((a, b) => names[a].localeCompare(names[b], undefined, { numeric: true }));
  const rows = [];
  for (let time = when.from; time <= when.to; time += when.step) {
    rows.push([new Date(time * 1000), ...order.map((index) => {
      const value = columns[index].get(time);
      return value === undefined || !Number.isFinite(value) ? null : value;
    })]);
  }
  return { names: order.map((index) => names[index]), rows };
}

function legend(shown, row) {
  const { panel, names, list } = shown;
  const chosen = colors(names);
  list.replaceChildren(...names.map((name, index) => {
    const mark = element('i');
    mark.style.background = chosen[index];
    return element('li', {}, mark, name, element('b', {}, written(row ? row[index + 1] : null, panel.unit)));
  }));
  if (row && shown.hovered) list.append(element('li', { class: 'when' }, row[0].toLocaleTimeString([], { hour: '2-digit', minute: '2-digit', second: '2-digit' })));
}

function lastOf(rows, count) {
  const last = [rows.length ? rows[rows.length - 1][0] : null];
  for (let column = 1; column <= count; column += 1) {
    let value = null;
    for (let index = rows.length - 1; index >= Math.max(0, rows.length - 4) && value === null; index -= 1) value = rows[index][column];
    last.push(value);
  }
  return last;
}

function draw(shown, found, when) {
  const { panel, canvas, nothing } = shown;
  const some = found.rows.some((row) => row.slice(1).some((value) => value !== null));
  shown.names = some ? found.names : [];
  shown.rows = found.rows;
  nothing.textContent = some ? '' : 'no figures in this time';
  canvas.parentElement.dataset.points = some ? found.rows.reduce((sum, row) => sum + row.slice(1).filter((value) => value !== null).length, 0) : 0;
  legend(shown, lastOf(found.rows, shown.names.length));
  if (!some) {
    if (shown.plot) shown.plot.destroy();
    shown.plot = null;
    return;
  }
  const style = getComputedStyle(document.documentElement);
  const stack = panel.kind === 'stack';
  let most = panel.top || 0;
  if (!panel.top) {
    for (const row of found.rows) {
      const values = row.slice(1).filter((value) => value !== null);
      most = Math.max(most, stack ? values.reduce((a, b) => a + b, 0) : Math.max(0, ...values));
    }
  }
  const options = {
    file: found.rows,
    labels: ['time', ...found.names.map((name, index) => `${index} ${name}`)],
    colors: colors(found.names),
    stackedGraph: stack,
    fillGraph: stack,
    fillAlpha: stack ? 0.35 : 0.1,
    strokeWidth: 1.6,
    dateWindow: [when.from * 1000, when.to * 1000],
    valueRange: [0, most > 0 ? most * (panel.top ? 1.02 : 1.12) : 1],
    gridLineColor: style.getPropertyValue('--grid').trim(),
    axisLineColor: style.getPropertyValue('--line').trim(),
    axes: {
      x: { axisLabelWidth: 62, pixelsPerLabel: 58 },
      y: { axisLabelWidth: 62, pixelsPerLabel: 34, axisLabelFormatter: (value) => written(value, panel.unit) },
    },
  };
  if (shown.plot) {
    shown.plot.updateOptions(options);
    return;
  }
  const { file, ...rest } = options;
  shown.plot = new window.Dygraph(canvas, file, {
    ...rest,
    legend: 'never',
    highlightCircleSize: 3,
    rightGap: 8,
    animatedZooms: false,
    highlightCallback: (_event, _x, _points, row) => {
      shown.hovered = true;
      legend(shown, shown.rows[row]);
    },
    unhighlightCallback: () => {
      shown.hovered = false;
      legend(shown, lastOf(shown.rows, shown.names.length));
    },
    zoomCallback: (from, to) => {
      const here = span();
      if (Math.abs(from / 1000 - here.from) < here.step && Math.abs(to / 1000 - here.to) < here.step) return;
      choose(null, from / 1000, to / 1000);
    },
    interactionModel: { ...window.Dygraph.defaultInteractionModel, dblclick: () => choose(state.range), touchstart: undefined, touchmove: undefined, touchend: undefined },
  });
}

async function tile(shown) {
  const { about, box, value } = shown;
  const [found, all] = await Promise.all([now(about.query), about.of ? now(about.of) : null]);
  let kind = 'good';
  if (about.of) kind = found === all ? 'good' : found ? 'warn' : 'bad';
  else if (about.warn === undefined) kind = '';
  else if (found !== null) {
    const past = (limit) => (about.low ? found < limit : found > limit);
    kind = past(about.bad) ? 'bad' : past(about.warn) ? 'warn' : 'good';
  }
  if (found === null) kind = '';
  box.className = `card tile ${kind}`;
  const [text, unit] = found === null ? [about.none || '–', ''] : parts(found, about.unit);
  value.replaceChildren(about.of && found !== null ? `${text} of ${number(all)}` : text, unit ? element('small', {}, unit) : '');
}

const WORDS = { firing: ['raised', 'bad'], pending: ['coming', 'warn'], inactive: ['quiet', 'good'] };

function ago(moment) {
  const seconds = (Date.now() - new Date(moment)) / 1000;
  const [count, unit] = seconds < 120 ? [seconds, 's'] : seconds < 7200 ? [seconds / 60, 'min'] : seconds < 172800 ? [seconds / 3600, 'h'] : [seconds / 86400, 'days'];
  return `${Math.round(count)} ${unit} ago`;
}

async function alerts() {
  const rules = (await ask('rules', { type: 'alert' })).groups.flatMap((group) => group.rules);
  const loud = rules.flatMap((rule) => rule.alerts.map((alert) => ({ ...alert, name: rule.name })))
    .sort((a, b) => a.state.localeCompare(b.state) || a.activeAt.localeCompare(b.activeAt));
  const row = (kind, tone, name, words, more, since) => element('tr', { 'data-alert': name, 'data-state': kind },
    element('td', {}, element('span', { class: `badge ${tone}` }, kind)), element('td', {}, name),
    element('td', {}, words, more ? element('small', {}, more) : ''), element('td', {}, since));
  const body = byId('alerts').tBodies[0];
  body.replaceChildren(...loud.map((alert) => {
    const [kind, tone] = WORDS[alert.state];
    const color = tone === 'bad' && alert.labels.severity !== 'critical' ? 'warn' : tone;
    return row(kind, color, alert.name, alert.annotations.summary || '', alert.annotations.description, ago(alert.activeAt));
  }));
  if (!loud.length) body.append(element('tr', {}, element('td', { class: 'none', colspan: '4' }, 'None is raised.')));
  const calm = rules.filter((rule) => !rule.alerts.length);
  byId('quiet').querySelector('summary').textContent = `${calm.length} of ${rules.length} are quiet`;
  byId('quiet').querySelector('tbody').replaceChildren(...calm.map((rule) => row('quiet', rule.health === 'ok' ? 'good' : 'warn', rule.name,
    element('code', {}, rule.query), rule.lastError || '', `must hold for ${rule.duration < 120 ? `${rule.duration} s` : `${Math.round(rule.duration / 60)} min`}`)));
  const raised = loud.filter((alert) => alert.state === 'firing');
  const worst = raised.some((alert) => alert.labels.severity === 'critical') ? 'bad' : raised.length ? 'warn' : 'good';
  byId('verdict').className = `badge ${worst}`;
  byId('verdict').textContent = raised.length ? `${raised.length} alert${raised.length > 1 ? 's' : ''}` : 'all is well';
}

async function refresh() {
  if (state.busy) {
    state.again = true;
    return;
  }
  state.busy = true;
  clearTimeout(state.timer);
  const when = span();
  const trouble = new Set();
  const jobs = [alerts, ...state.tiles.map((shown) => () => tile(shown)),
    ...state.panels.map((shown) => async () => draw(shown, await series(shown.panel, when), when))];
  // A few at a time: Prometheus answers so many at once.
  const worker = async () => {
    for (let job = jobs.shift(); job; job = jobs.shift()) await job().catch((error) => trouble.add(error.message));
  };
  await Promise.all(Array.from({ length: 6 }, worker));
  byId('trouble').hidden = !trouble.size;
  byId('trouble').textContent = [...trouble].join('; ');
  if (trouble.size) {
    byId('verdict').className = 'badge bad';
    byId('verdict').textContent = 'unknown';
  }
  const time = (moment) => new Date(moment * 1000).toLocaleString([], { dateStyle: 'medium', timeStyle: 'short' });
  byId('shown').textContent = `${time(when.from)} to ${time(when.to)}, a point each ${when.step} s; figures are kept for ${state.site.retention_days} days`;
  document.documentElement.dataset.drawn = Number(document.documentElement.dataset.drawn || 0) + 1;
  state.busy = false;
  if (state.again) {
    state.again = false;
    refresh();
  } else if (!state.to) state.timer = setTimeout(refresh, REFRESH * 1000);
}

function choose(range, from = null, to = null) {
  if (range) state.range = range;
  state.from = from;
  state.to = to;
  for (const button of byId('ranges').children) button.setAttribute('aria-pressed', String(!from && Number(button.value) === state.range));
  if (range) history.replaceState(null, '', `#${range}`);
  refresh();
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  for (const shown of state.panels) {
    if (!shown.plot) continue;
    const style = getComputedStyle(document.documentElement);
    shown.plot.updateOptions({
      colors: colors(shown.names), gridLineColor: style.getPropertyValue('--grid').trim(), axisLineColor: style.getPropertyValue('--line').trim(),
    });
    legend(shown, lastOf(shown.rows, shown.names.length));
  }
}

function build(held) {
  // The page has legends of its own; dygraphs' would need inline styles, which the gateway's policy forbids.
  window.Dygraph.PLUGINS = window.Dygraph.PLUGINS.filter((plugin) => plugin !== window.Dygraph.Plugins.Legend);
  state.tiles = held.tiles.map((about) => {
    const value = element('div', { class: 'value' }, '–');
    const box = element('article', { class: 'card tile' }, element('h3', {}, about.title), value, element('p', {}, about.words));
    byId('tiles').append(box);
    return { about, box, value };
  });
  for (const section of held.sections) {
    const panels = element('div', { class: 'panels', 'data-columns': section.panels.length % 4 ? '3' : '4' });
    byId('sections').append(element('section', {}, element('h2', {}, section.title), panels));
    for (const panel of section.panels) {
      const canvas = element('div', { class: 'canvas' });
      const nothing = element('div', { class: 'nothing' });
      const list = element('ul', { class: 'legend' });
      panels.append(element('article', { class: 'card panel', 'data-title': `${section.title}: ${panel.title}` },
        element('span', { class: 'unit' }, { '/s': 'per second', s: 'seconds', B: 'bytes', 'B/s': 'bytes/s', '%': '%', '': 'count' }[panel.unit]),
        element('h3', { title: panel.title }, panel.title),
        element('p', { class: 'words', title: panel.words }, panel.words), element('div', { class: 'plot' }, canvas, nothing), list));
      state.panels.push({ panel, canvas, nothing, list, plot: null, names: [], rows: [], hovered: false });
    }
  }
}

async function begin() {
  const [site, held] = await Promise.all(['site.json', 'panels.json'].map(async (name) => (await fetch(name)).json()));
  state.site = site;
  byId('site').textContent = `MLflow: ${site.site}`;
  document.title = `MLflow ${site.site}: how it is`;
  for (const [text, seconds] of Object.entries(RANGES)) {
    const button = element('button', { type: 'button', value: seconds, 'aria-pressed': 'false' }, text);
    button.addEventListener('click', () => choose(seconds));
    byId('ranges').append(button);
  }
  const system = window.matchMedia('(prefers-color-scheme: dark)');
  const kept = localStorage.getItem('mlflow-kit-theme');
  document.documentElement.dataset.theme = kept || (system.matches ? 'dark' : 'light');
  system.addEventListener('change', () => localStorage.getItem('mlflow-kit-theme') || theme(system.matches ? 'dark' : 'light'));
  byId('theme').addEventListener('click', () => {
    theme(dark() ? 'light' : 'dark');
    localStorage.setItem('mlflow-kit-theme', document.documentElement.dataset.theme);
  });
  build(held);
  const asked = Number(location.hash.slice(1));
  choose(Object.values(RANGES).includes(asked) ? asked : 3600);
}

document.addEventListener('visibilitychange', () => !document.hidden && state.tiles && !state.to && refresh());
begin().catch((error) => {
  byId('trouble').hidden = false;
  byId('trouble').textContent = `The page cannot begin: ${error.message}`;
});
