{{- define "disaggserve.labels" -}}
app.kubernetes.io/name: disaggserve
app.kubernetes.io/component: operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "disaggserve.selector" -}}
app.kubernetes.io/name: disaggserve
app.kubernetes.io/component: operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "disaggserve.tag" -}}
{{- .Values.image.tag | default .Chart.AppVersion -}}
{{- end }}
